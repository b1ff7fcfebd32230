/* load: the client of the benchmarks. One thread, one epoll, no library, so that it costs less than any server.
 *
 *   load http      HOST PORT PATH CLIENTS SECONDS               one request under way on each keep-alive connection
 *   load echo      HOST PORT PATH CLIENTS SECONDS SIZE          one WebSocket message under way on each connection
 *   load broadcast HOST PORT PATH CLIENTS SECONDS SIZE WINDOW   client 0 publishes, everyone must receive everything;
 *                                                               at most WINDOW broadcasts are not yet with all
 *   load connect   HOST PORT PATH CLIENTS WINDOW                open CLIENTS WebSockets, at most WINDOW at a time
 *   load hold      HOST PORT PATH CLIENTS                       open them and keep them
 *
 * In step with the program that measures, which wants to read the servers' CPU clocks at the right moments:
 *   1. connect (not in mode connect) and warm up; write "ready" to stdout; wait for a line on stdin, serving sockets
 *   2. work; write one line of JSON to stdout
 *   3. keep all sockets as they are until stdin ends, so that closing them is not part of anybody's figure
 *
 * A broadcast message is a text that begins with "B", a sequence number of 10 digits, a space, and the time of
 * sending in 19 digits of nanoseconds; the rest is filling. Every gap and every repetition is counted: a fast server
 * that loses messages must not win. Exit status 1: connections failed or messages were lost; the JSON says which.
 *
 * Does not do: TLS, chunked responses, fragments. To add a mode: a row in MODES and what it does in on_open(),
 * on_message() and finished().
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum mode { HTTP, ECHO, BROADCAST, CONNECT, HOLD };
static const struct { const char *name; int argument_count; } MODES[] = {
    [HTTP] = {"http", 7}, [ECHO] = {"echo", 8}, [BROADCAST] = {"broadcast", 9}, [CONNECT] = {"connect", 7}, [HOLD] = {"hold", 6},
};

enum state { UNUSED, HANDSHAKE, OPEN, GONE };

struct connection {
    int fd;
    enum state state;
    char *input;             /* received and not yet understood; freed whenever it is empty and was large */
    size_t input_length, input_capacity;
    char *output;            /* what the kernel did not take at once; only then is EPOLLOUT asked for */
    size_t output_length, output_capacity;
    uint64_t sent_at_ns;     /* http, echo: when the one message under way left */
    uint64_t last_sequence;  /* broadcast: the newest message received */
};

static enum mode mode;
static const char *host, *path;
static int port, client_count, window = 1;
static size_t message_bytes;
static double seconds;
static int poll_fd;
static struct connection *connections;

static char request[2048];
static size_t request_length;

/* What is counted; reset between the warm-up and the measured time. */
static uint64_t open_count, failed_count, closed_count, delivered_count, gap_count, repeated_count;

/* Latencies in buckets of 1 us up to 2 s; what is above counts as 2 s. */
#define BUCKETS 2000000
static uint32_t *buckets;
static uint64_t latency_count, latency_max_us;

/* Broadcasts: how many clients have each message, in a ring (window is far smaller). */
#define RING 4096
static uint32_t received_by[RING];
static uint64_t next_sequence = 1, completed_count, completed_before;
static uint64_t stop_at_ns = UINT64_MAX; /* nothing new is sent after this */

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(2);
}

static void count_latency(uint64_t ns) {
    uint64_t us = ns / 1000;
    buckets[us < BUCKETS ? us : BUCKETS - 1]++;
    latency_count++;
    if (us > latency_max_us) latency_max_us = us;
}

static double percentile_ms(double share) {
    uint64_t wanted = (uint64_t)(share * (double)latency_count), seen = 0;
    for (uint32_t us = 0; us < BUCKETS; us++) {
        seen += buckets[us];
        if (seen > wanted) return us / 1000.0;
    }
    return 0;
}

/* Connections */

static void watch(struct connection *c, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(poll_fd, operation, c->fd, &event)) die("epoll_ctl");
}

static void lose(struct connection *c) {
    if (c->state == GONE) return;
    if (c->state == OPEN) open_count--, closed_count++;
    else failed_count++;
    c->state = GONE;
    close(c->fd);
}

static void flush(struct connection *c) {
    while (c->output_length) {
        ssize_t n = send(c->fd, c->output, c->output_length, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN || errno == ENOTCONN) watch(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
            else lose(c);
            return;
        }
        memmove(c->output, c->output + n, c->output_length - (size_t)n);
        c->output_length -= (size_t)n;
    }
    watch(c, EPOLLIN, EPOLL_CTL_MOD);
}

static void put(struct connection *c, const char *data, size_t length) {
    if (c->state == GONE) return;
    if (!c->output_length) {
        ssize_t n = send(c->fd, data, length, MSG_NOSIGNAL);
        if (n == (ssize_t)length) return;
        if (n < 0 && errno != EAGAIN && errno != ENOTCONN) { lose(c); return; }
        if (n > 0) data += n, length -= (size_t)n;
    }
    if (c->output_capacity < c->output_length + length) {
        c->output_capacity = c->output_length + length;
        if (!(c->output = realloc(c->output, c->output_capacity))) die("realloc");
    }
    memcpy(c->output + c->output_length, data, length);
    c->output_length += length;
    watch(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_MOD);
}

static void dial(struct connection *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    if (inet_pton(AF_INET, host, &address.sin_addr) != 1) { fprintf(stderr, "HOST is an IPv4 address\n"); exit(2); }
    int one = 1;
    if ((c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0)) < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) die("connect");
    c->state = HANDSHAKE;
    if (!(c->output = malloc(request_length))) die("malloc");
    memcpy(c->output, request, request_length);
    c->output_length = c->output_capacity = request_length;
    watch(c, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
}

/* Messages */

static void send_message(struct connection *c, uint64_t sequence) {
    static char frame[70000];
    char *p = frame;
    size_t n = message_bytes;
    *p++ = (char)0x81;
    if (n < 126) *p++ = (char)(0x80 | n);
    else *p++ = (char)(0x80 | 126), *p++ = (char)(n >> 8), *p++ = (char)(n & 255);
    memset(p, 0, 4); /* a mask of zeros: RFC 6455 wants one, and the server's work is the same with any */
    p += 4;
    char head[40];
    c->sent_at_ns = now_ns();
    int head_length = snprintf(head, sizeof head, "B%010llu %019llu ", (unsigned long long)sequence,
                               (unsigned long long)c->sent_at_ns);
    memset(p, 'x', n);
    memcpy(p, head, (size_t)head_length);
    put(c, frame, (size_t)(p - frame) + n);
}

static void publish(void) {
    while (next_sequence - 1 - completed_count < (uint64_t)window && now_ns() < stop_at_ns && connections[0].state == OPEN) {
        received_by[next_sequence % RING] = 0;
        send_message(&connections[0], next_sequence++);
    }
}

static void send_next(struct connection *c) {
    if (mode == ECHO) send_message(c, ++c->last_sequence);
    else c->sent_at_ns = now_ns(), put(c, request, request_length);
}

static void on_message(struct connection *c, const char *data, size_t length) {
    uint64_t now = now_ns();
    if (mode == ECHO) {
        if (length != message_bytes || strtoull(data + 1, NULL, 10) != c->last_sequence) gap_count++;
        count_latency(now - c->sent_at_ns);
        delivered_count++;
        if (now < stop_at_ns) send_next(c);
    } else if (mode == BROADCAST && length >= 32 && data[0] == 'B') {
        uint64_t sequence = strtoull(data + 1, NULL, 10);
        count_latency(now - strtoull(data + 12, NULL, 10));
        delivered_count++;
        if (c->last_sequence && sequence <= c->last_sequence) { repeated_count++; return; }
        if (c->last_sequence && sequence != c->last_sequence + 1) gap_count++;
        c->last_sequence = sequence;
        if (++received_by[sequence % RING] == (uint32_t)client_count) completed_count++, publish();
    }
}

/* Take one complete unit from the input; return its size, 0 if it is not complete. */
static size_t take_response(struct connection *c, char *input, size_t length) {
    char *end = memmem(input, length, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head_length = (size_t)(end - input) + 4, body_length = 0;
    if (c->state == HANDSHAKE && mode != HTTP) {
        if (memcmp(input, "HTTP/1.1 101", 12)) { lose(c); return 0; }
        c->state = OPEN, open_count++;
        return head_length;
    }
    if (memcmp(input, "HTTP/1.1 200", 12)) { lose(c); return 0; }
    for (char *line = memchr(input, '\n', head_length); line && line < end; line = memchr(line + 1, '\n', (size_t)(end - line)))
        if (!strncasecmp(line + 1, "content-length:", 15)) body_length = strtoul(line + 16, NULL, 10);
    if (length < head_length + body_length) return 0;
    if (c->state == HANDSHAKE) { c->state = OPEN, open_count++; return head_length + body_length; }
    uint64_t now = now_ns();
    count_latency(now - c->sent_at_ns);
    delivered_count++;
    if (now < stop_at_ns) send_next(c);
    return head_length + body_length;
}

static size_t take_frame(struct connection *c, char *input, size_t length) {
    if (length < 2) return 0;
    unsigned char *b = (unsigned char *)input;
    size_t payload_length = b[1] & 127, head_length = 2;
    if (payload_length == 126) {
        if (length < 4) return 0;
        payload_length = (size_t)(b[2] << 8 | b[3]), head_length = 4;
    } else if (payload_length == 127) {
        if (length < 10) return 0;
        payload_length = 0, head_length = 10;
        for (int i = 2; i < 10; i++) payload_length = payload_length << 8 | b[i];
    }
    if (length < head_length + payload_length) return 0;
    char *payload = input + head_length;
    int opcode = b[0] & 15;
    if (opcode == 1 || opcode == 2) on_message(c, payload, payload_length);
    else if (opcode == 8) lose(c);
    else if (opcode == 9 && payload_length <= 125) {
        char pong[131] = {(char)0x8a, (char)(0x80 | payload_length)};
        memcpy(pong + 6, payload, payload_length);
        put(c, pong, 6 + payload_length);
    }
    return head_length + payload_length;
}

static void understand(struct connection *c) {
    size_t taken = 0, n;
    do {
        int is_head = mode == HTTP || c->state == HANDSHAKE;
        n = (is_head ? take_response : take_frame)(c, c->input + taken, c->input_length - taken);
        taken += n;
    } while (n && c->state != GONE && taken < c->input_length);
    memmove(c->input, c->input + taken, c->input_length - taken);
    c->input_length -= taken;
}

static void readable(struct connection *c) {
    /* One buffer for all: a connection keeps one of its own only while a message is incomplete. */
    static char shared[262144];
    for (;;) {
        char *own = c->input;
        size_t own_length = c->input_length, own_capacity = c->input_capacity;
        if (!own_length) c->input = shared, c->input_capacity = sizeof shared;
        else if (own_capacity - own_length < 16384) {
            c->input_capacity = own_capacity + 65536;
            if (!(c->input = own = realloc(own, c->input_capacity))) die("realloc");
            own_capacity = c->input_capacity;
        }
        size_t room = c->input_capacity - c->input_length;
        ssize_t n = recv(c->fd, c->input + c->input_length, room, 0);
        if (n > 0) c->input_length += (size_t)n, understand(c);
        int error = errno;
        if (c->input == shared) {
            size_t left = c->input_length;
            c->input = own, c->input_capacity = own_capacity;
            if (left > own_capacity) {
                if (!(c->input = realloc(own, left + 16384))) die("realloc");
                c->input_capacity = left + 16384;
            }
            memcpy(c->input, shared, left);
        }
        if (n == 0 || (n < 0 && error != EAGAIN)) { lose(c); return; }
        if (n < (ssize_t)room || c->state == GONE) return;
    }
}

/* The run */

static void step(int timeout_ms) {
    static struct epoll_event events[1024];
    int count = epoll_wait(poll_fd, events, 1024, timeout_ms);
    for (int i = 0; i < count; i++) {
        struct connection *c = events[i].data.ptr;
        if (!c) continue; /* stdin; its reader asks for itself */
        if (c->state != GONE && events[i].events & EPOLLOUT) flush(c);
        if (c->state != GONE && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
    }
}

static void connect_all(int at_once) {
    uint64_t deadline = now_ns() + 120000000000u;
    int dialed = 0;
    while (open_count + failed_count + closed_count < (uint64_t)client_count && now_ns() < deadline) {
        while (dialed < client_count && dialed - (int)(open_count + failed_count + closed_count) < at_once)
            dial(&connections[dialed++]);
        step(20);
    }
}

/* Wait for a line (or the end) on stdin while the sockets are served; 0 at the end. */
static int wait_for_stdin(void) {
    char byte;
    for (;;) {
        ssize_t n = read(0, &byte, 1);
        if (n == 0) return 0;
        if (n == 1 && byte == '\n') return 1;
        if (n < 0 && errno != EAGAIN) die("stdin");
        if (n < 0) step(50);
    }
}

static int quiet(void) { /* nothing is under way any more */
    if (mode == BROADCAST) return completed_count == next_sequence - 1;
    return 1;
}

static void work(double duration_s) {
    uint64_t end = now_ns() + (uint64_t)(duration_s * 1e9);
    stop_at_ns = end;
    if (mode == BROADCAST) publish();
    else
        for (int i = 0; i < client_count; i++)
            if (connections[i].state == OPEN) send_next(&connections[i]);
    while (now_ns() < end) step(20);
    /* Answers that are under way arrive: they cost the servers CPU inside the bracket. 10 s, then they are lost. */
    uint64_t patience = now_ns() + (quiet() ? 200000000u : 10000000000u);
    while (now_ns() < patience && (mode == BROADCAST ? !quiet() : 1)) {
        uint64_t before = delivered_count;
        step(50);
        if (mode != BROADCAST && before == delivered_count) break;
    }
}

int main(int count, char **arguments) {
    int known = 0;
    for (size_t i = 0; count > 1 && i < sizeof MODES / sizeof *MODES; i++)
        if (!strcmp(arguments[1], MODES[i].name) && count == MODES[i].argument_count) mode = (enum mode)i, known = 1;
    if (!known) {
        fprintf(stderr, "usage: load http|echo|broadcast|connect|hold HOST PORT PATH CLIENTS …; see the head of load.c\n");
        return 2;
    }
    host = arguments[2], port = atoi(arguments[3]), path = arguments[4], client_count = atoi(arguments[5]);
    if (mode == CONNECT) window = atoi(arguments[6]);
    else if (mode != HOLD) seconds = atof(arguments[6]);
    if (mode == ECHO || mode == BROADCAST) message_bytes = (size_t)atoi(arguments[7]);
    if (mode == BROADCAST) window = atoi(arguments[8]);
    if (client_count < 1 || (message_bytes && (message_bytes < 40 || message_bytes > 65535)) || window < 1 || window > RING / 2) {
        fprintf(stderr, "CLIENTS is 1 or more, SIZE 40 to 65535, WINDOW 1 to %d\n", RING / 2);
        return 2;
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (!(connections = calloc((size_t)client_count, sizeof *connections)) || !(buckets = calloc(BUCKETS, 4))) die("calloc");
    if ((poll_fd = epoll_create1(0)) < 0) die("epoll_create1");
    fcntl(0, F_SETFL, fcntl(0, F_GETFL) | O_NONBLOCK);
    struct epoll_event from_stdin = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, 0, &from_stdin); /* EPERM for a file or /dev/null: then it is always readable */
    request_length = (size_t)snprintf(
        request, sizeof request,
        mode == HTTP ? "GET %s HTTP/1.1\r\nHost: %s:%d\r\n\r\n"
                     : "GET %s HTTP/1.1\r\nHost: %s:%d\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                       "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
        path, host, port);

    if (mode != CONNECT) connect_all(128);
    if (mode == HTTP || mode == ECHO || mode == BROADCAST) {
        /* Applications that join a group after they accepted have done so by then. */
        for (uint64_t end = now_ns() + 1000000000u; now_ns() < end;) step(50);
        client_count = mode == BROADCAST ? (int)open_count : client_count;
        work(seconds < 4 ? seconds / 4 : 1);
    }
    delivered_count = latency_count = 0;
    completed_before = completed_count;
    memset(buckets, 0, BUCKETS * 4);
    printf("ready\n");
    fflush(stdout);
    if (!wait_for_stdin()) return 2;

    uint64_t began = now_ns();
    if (mode == CONNECT) connect_all(window);
    else if (mode != HOLD) work(seconds);
    double elapsed_s = (double)(now_ns() - began) / 1e9;
    if (mode == HTTP || mode == ECHO) elapsed_s = seconds; /* what came after the end is a handful */
    uint64_t work_done = mode == CONNECT ? open_count : delivered_count;
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    double cpu_s = (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) + (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
    uint64_t missing = mode == BROADCAST ? next_sequence - 1 - completed_count : 0;
    printf("{\"mode\": \"%s\", \"clients\": %llu, \"failed\": %llu, \"closed\": %llu, \"seconds\": %.3f, \"count\": %llu, "
           "\"per_s\": %.1f, \"broadcasts\": %llu, \"incomplete\": %llu, \"gaps\": %llu, \"repeated\": %llu, "
           "\"p50_ms\": %.3f, \"p99_ms\": %.3f, \"max_ms\": %.3f, \"client_cpu_s\": %.2f}\n",
           MODES[mode].name, (unsigned long long)open_count, (unsigned long long)failed_count, (unsigned long long)closed_count,
           elapsed_s, (unsigned long long)work_done, (double)work_done / (elapsed_s > 0 ? elapsed_s : 1),
           (unsigned long long)(completed_count - completed_before), (unsigned long long)missing,
           (unsigned long long)gap_count, (unsigned long long)repeated_count,
           latency_count ? percentile_ms(0.5) : 0.0, latency_count ? percentile_ms(0.99) : 0.0,
           latency_max_us / 1000.0, cpu_s);
    fflush(stdout);
    while (wait_for_stdin()) {}
    return failed_count || closed_count || missing || gap_count || repeated_count;
}
