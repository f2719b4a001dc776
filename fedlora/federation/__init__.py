"""One federated run: its server, its clients, and the messages between them."""
