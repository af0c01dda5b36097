"""From a spec to a record: the only floor that knows everybody below."""
