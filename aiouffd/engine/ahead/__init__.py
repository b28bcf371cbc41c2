"""What brings pages before they are touched: a recording, the background fill."""
