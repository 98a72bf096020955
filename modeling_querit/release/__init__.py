"""From a folder to the Hub: what a stranger would trip over, the card, the upload."""
