"""What brings the pages of a space: a source, or a handler."""
