"""How much an artifact lost: the same work done by it and by a reference, and every difference with its interval."""
