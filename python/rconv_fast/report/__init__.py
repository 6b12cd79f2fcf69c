"""What a person reads of a result: text, JSON, a page, pictures."""
