// The program sends one INCR to Redis for each request. net/http and go-redis have their default settings.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/redis/go-redis/v9"
)

func main() {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + os.Getenv("REDIS_PORT")})
	http.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		hits, err := client.Incr(r.Context(), "go:hits").Result()
		if err != nil {
			http.Error(w, "Redis fails", http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintf(w, "Hello from Redis! I have been seen %d times.\n", hits)
	})
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("BIND_PORT"), nil))
}
