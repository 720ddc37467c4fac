"""Twin networks by machine."""
