"""The page of a sweep's spec: what its tables and figures are, which records they are made from, and how."""
