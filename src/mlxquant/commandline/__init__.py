"""What every command shares: click options, and how a command talks to people and to programs."""
