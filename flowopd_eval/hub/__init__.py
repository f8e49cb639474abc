"""What is published on the Hub: adapters with their card, runs, the app; and whether a card keeps its word."""
