"""Networks: opening them, and looking inside."""
