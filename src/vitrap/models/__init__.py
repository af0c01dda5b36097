"""Vision transformers: opening them, and looking inside."""
