"""Measurements that print what they find: speed and ranking quality."""
