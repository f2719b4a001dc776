"""The server's half: the rounds, who takes part, and what is proved of them."""
