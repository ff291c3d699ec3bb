"""Values of `Accept`. Each comes with the media type of the answer, if a resource offers text first and JSON second."""

TEXT, JSON = "text/plain", "application/json"

CHOICES = [
    # the client accepts one media type, or any media type that matches a wildcard
    ("text/plain", TEXT),
    ("application/json", JSON),
    ("APPLICATION/JSON", JSON),
    ("application/*", JSON),
    ("text/*", TEXT),
    ("*/*", TEXT),
    ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8", TEXT),  # browsers send this
    # the media type with the highest quality is chosen
    ("text/plain;q=0.5, application/json", JSON),
    ("text/plain;q=0.5, application/json;q=0.4", TEXT),
    ("text/plain;q=0.123,application/json;q=0.124", JSON),
    ("text/plain; Q=0.1 ; ext=1, application/json; q=0.2", JSON),
    ("text/plain;q=0.001", TEXT),
    # the most specific range that matches a media type decides its quality, wherever the range stands
    ("*/*, text/plain;q=0.1", JSON),
    ("text/plain;q=0.1, */*;q=0.2", JSON),
    ("*/*;q=0.1, application/json", JSON),
    ("text/*;q=0.1, */*;q=0.5, application/json;q=0.3", JSON),
    ("text/*;q=0, */*", JSON),
    ("text/plain;q=0, */*;q=0.1", JSON),
    # among equal qualities, the order of `Accept` decides, then the order in which the resource offers the media types
    ("application/json, text/plain", JSON),
    ("text/plain, application/json", TEXT),
    ("application/*, text/*", JSON),
    ("*/*, */*", TEXT),
    # the client accepts no media type that the resource offers
    ("text/html", None),
    ("image/*", None),
    ("*/*;q=0", None),
    ("text/plain;q=0", None),
    ("text/plain;q=0.000, application/json;q=0", None),
    ("text/plain+x", None),
    ("text/plai", None),
    # malformed parts are ignored, and the other parts decide
    ("", TEXT),
    (" ", TEXT),
    (",", TEXT),
    ("nonsense", TEXT),
    ("*", TEXT),
    ("text/", TEXT),
    ("/json", TEXT),
    ("text/plain/x", TEXT),
    ("*/json", None),
    (";;;, application/json", JSON),
    ("text plain, application/json;q=0.1", JSON),
    ("application/json;q=2", JSON),
    ("application/json;q=-1", JSON),
    ("application/json;q=", JSON),
    ("application/json;;q=1;", JSON),
    ("caf\u00e9/\u00e9, application/json", JSON),
]
