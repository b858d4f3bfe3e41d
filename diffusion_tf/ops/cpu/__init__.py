"""How a CPU computes the operations; nothing outside `ops` and `runtime` imports this."""
