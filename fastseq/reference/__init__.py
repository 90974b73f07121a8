"""One readable eager specification per op. Fast files never import these; tests and double backward do."""
