"""The predict service: the champion behind REST, and a web page."""
