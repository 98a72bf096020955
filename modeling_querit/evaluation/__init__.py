"""Evaluation: how good an order is, against human judgements."""
