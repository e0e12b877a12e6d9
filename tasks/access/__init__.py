"""Who may in: the password of our servers, and the servers as we start them."""
