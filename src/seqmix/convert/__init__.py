"""Models of other libraries, made to run fast here."""
