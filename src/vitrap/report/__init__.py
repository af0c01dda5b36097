"""From records to what people look at; knows JSON, never torch."""
