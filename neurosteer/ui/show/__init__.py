"""What the page shows, as pure functions; everything that comes from outside is escaped here."""
