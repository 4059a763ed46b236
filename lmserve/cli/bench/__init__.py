"""``lmserve bench``: what a server does under load, measured from outside like any client would."""
