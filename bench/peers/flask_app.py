"""Run the code from which hitcounter started. The code sends INCR, then GET, so two clients may get the same number."""

import os

from flask import Flask, request
from redis import Redis

app = Flask(__name__)
redis = Redis(host="127.0.0.1", port=int(os.environ["REDIS_PORT"]))


@app.route("/", methods=["GET", "POST"])
def hello() -> str:
    if request.method == "POST":
        redis.incr("flask:posts")
        return f"POST requests served: {redis.get('flask:posts').decode()}.\n"
    redis.incr("flask:hits")
    return f"Hello from Redis! I have been seen {redis.get('flask:hits').decode()} times.\n"
