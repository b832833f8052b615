"""Quality on real weights and real data: held-out numbers, made by a command."""
