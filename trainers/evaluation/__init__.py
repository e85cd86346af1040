"""How memories of bounded size are scored, and compared."""
