"""Text made fit for a message: on one line and not too long."""
