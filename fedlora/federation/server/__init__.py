"""The server's side of a run: its rounds, who takes part, and what is proved of each round."""
