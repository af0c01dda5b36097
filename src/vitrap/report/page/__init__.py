"""The report page: `make` puts it together from the parts that the other files make."""
