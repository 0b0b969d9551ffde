"""What passes share: reading and making nodes, sizes, subgraphs, lookups by value. No pass lives here."""
