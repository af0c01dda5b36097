"""Makes reports, tables and figures from records; it never imports torch."""
