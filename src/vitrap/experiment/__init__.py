"""From a spec to a record: the only layer that uses all layers below."""
