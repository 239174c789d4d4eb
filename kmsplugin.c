/*
 * kmsplugin - a Kubernetes KMS plugin: envelope encryption under one KEK.
 *
 * The Kubernetes API server (kube-apiserver) keeps its objects in a database, etcd. It can
 * encrypt each value with a data encryption key (DEK) before it stores the value. It then
 * asks a KMS plugin to wrap the DEK, that is, to encrypt it under a key encryption key (KEK),
 * and stores the wrapped DEK beside the value. This is envelope encryption: a copy of the
 * database reveals no encrypted value to a reader without the KEK, and the API server never
 * has the KEK. The API server calls the plugin by gRPC, over a UNIX socket.
 *
 * This program is a complete KMS plugin. It seals (encrypts and authenticates) DEKs with
 * XAES-256-GCM, and takes its KEK from an environment variable or a file.
 *
 * Contents, in the order of the file: each section uses only the sections above it.
 *
 *     Constants      every limit, with its reason
 *     Types          every structure, with its owner
 *     Text           log lines, sentences on stderr, and the small printf under both
 *     Bytes          wiping, hex, base64, UTF-8, protobuf fields, random bytes
 *     Memory         blocks that are counted, kept and wiped; the arena
 *     Sealing        AES-GCM, XAES-256-GCM, the sealed form, the key ring
 *     Keys           where KEKs come from, and which ones are refused
 *     KMS service    the six RPCs: bytes in, bytes and a status out
 *     Metrics        counters, and their text for Prometheus
 *     gRPC           methods, grpc-timeout, percent-encoding
 *     HTTP requests  the rules for header fields
 *     Room           limits on what peers hold and cause to be logged
 *     HTTP/2         nghttp2's callbacks, in the order of a stream's life
 *     Connections    reading, writing, closing
 *     Endpoints      unix:///path and unix:///@name, bound or inherited
 *     Event loop     one thread, one epoll, no waiting anywhere else
 *     Confinement    the privileges given up before the first request
 *     Probe          a gRPC client that tries every RPC
 *     Rehearsal      a trial run of a confined server on this machine
 *     Rescue         recognizing input, and opening etcd values without an API server
 *     Options        the command line
 *     Main           one function for each verb
 *
 * A request takes this way through the file. The event loop (server_run) finds a connection
 * readable. conn_read passes the bytes it reads to nghttp2, the library that implements
 * HTTP/2. nghttp2 calls on_header for each header field, and request_field judges the field.
 * nghttp2 calls on_data_chunk_recv for each piece of the body, and stream_append removes the
 * gRPC prefix. At the end of the request stream_end calls kms_call. kms_call unpacks the
 * message, seals or opens, and packs the response. stream_answer passes the response to
 * nghttp2 as HEADERS, DATA and trailers. When nghttp2 has handled all bytes of the read,
 * conn_flush sends the output, up to 64 KiB in one system call.
 *
 * Some words have one meaning throughout. A peer is the process at the other end of a
 * connection. A turn is one pass of the event loop. To seal is to encrypt and authenticate
 * under a KEK; to open is to check and decrypt. A key_id names a KEK without revealing it.
 */
#define _GNU_SOURCE          /* accept4, struct ucred, environ */
#define _FILE_OFFSET_BITS 64 /* on 32-bit machines: inode numbers of 64 bits (large file systems) */
#define _TIME_BITS 64        /* on 32-bit machines: times after 2038 */
#include <bearssl.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <link.h>
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <nghttp2/nghttp2.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "kms.pb-c.h"

#ifndef VERSION /* the Makefile sets VERSION and BEARSSL_VERSION */
#error "VERSION and BEARSSL_VERSION come from the Makefile"
#endif

/* ---------------------------------------------------------------- Constants
 *
 * The limits of the program, each with its unit and its reason. They hold regardless of a
 * peer's behaviour. Together they keep the resident memory of the process under 16 MiB.
 *
 * A name that ends in _MAX is a limit, in _BYTES a size in bytes, in _MS a time in
 * milliseconds, in _DEFAULT the default of an option.
 *
 * Constants that belong to a single function are not here: they stand in that function.
 */
#define DEFAULT_ENDPOINT "unix:///run/kmsplugin/kms.sock"

enum {
    /* The sealed form (section Sealing). */
    KEK_BYTES = 32,
    FINGERPRINT_BYTES = 16,
    NONCE_BYTES = 24,
    TAG_BYTES = 16,
    BLOCK_BYTES = 16,
    HEADER_BYTES = 1 + FINGERPRINT_BYTES,
    SEALED_OVERHEAD = HEADER_BYTES + NONCE_BYTES + TAG_BYTES,
    SEALED_FORMAT = 0x01,

    /* Keys. */
    KEK_MAX = 16,                       /* a rotation needs two; a long-lived cluster collects more */
    KEK_TEXT_MAX = 4096,                /* sixteen keys of 44 characters, and room for white space */
    KEY_JUDGED_BYTES = 45,              /* decoded bytes to judge: a key in base64 twice decodes to 44 and a newline */
    KEY_ID_LEN = 2 * FINGERPRINT_BYTES,

    /* Messages. */
    GRPC_PREFIX_BYTES = 5,              /* compressed flag, 32-bit length */
    MESSAGE_MAX = 64 * 1024,            /* Kubernetes' own plugins and KMS libraries accept as much */
    V2_CIPHERTEXT_MAX = 1024,           /* kube-apiserver refuses a longer ciphertext */
    V1_REQUEST_OVERHEAD = 9 + 4,        /* field version "v1beta1"; tag and length of field cipher */
    V1_CIPHERTEXT_MAX = MESSAGE_MAX - V1_REQUEST_OVERHEAD, /* the longest that fits into a Decrypt request */

    /* HTTP/2. */
    STREAMS_MAX = 256,                  /* per connection; grpc-go uses at most 100 until it has our SETTINGS */
    STREAM_WINDOW_BYTES = 128 * 1024,   /* holds any request, so a stream needs no WINDOW_UPDATE */
    FIELDS_MAX_BYTES = 16 * 1024,       /* the fields of a request, counted as in RFC 9113 6.5.2 */
    FIELD_OVERHEAD_BYTES = 32,          /* that count adds this to each field */
    MESSAGE_TEXT_MAX = 160,             /* grpc-message, percent-encoded */
    METRICS_BYTES = 48 * 1024,          /* the longest possible page has about 34 KB */

    /* The server. */
    CONNECTIONS_DEFAULT = 256,          /* an API server opens one per KMS entry of its configuration at each load */
    CONNECTIONS_LIMIT = 4096,           /* the largest value of --max-connections */
    ALL_STREAMS_MAX = 4096,             /* open streams of all connections */
    BUFFERED_MAX = 4 * 1024 * 1024,     /* requests and unread answers of all connections */
    HEAP_MAX = 11 * 1024 * 1024,        /* requests, unread answers, streams, and nghttp2's own memory */
    USER_SERIES_MAX = 16,               /* uids with their own time series in /metrics */
    UNREAD_PAUSE_BYTES = 256 * 1024,    /* a peer with more unread answers than this gets no new window */
    LISTENERS_MAX = 16,
    FIRST_INHERITED = 3,                /* the first descriptor of LISTEN_FDS, see sd_listen_fds(3) */
    ACCEPT_BURST = 16,                  /* connections accepted from one listener in a turn */
    EVENTS_MAX = 64,                    /* events from one epoll_wait */
    TURN_BYTES = 64 * 1024,             /* read in a turn from all ready peers: limits how long a new peer waits */
    IN_BYTES = 16 * 1024,               /* read in a turn from one peer */
    OUT_BYTES = 64 * 1024,              /* sent in one write: the answers to a full read fit */
    ALLOWED_UIDS_MAX = 32,
    WAY_MAX = 1024,                     /* a socket's path (107 bytes), with links replaced by their targets */
    BACKLOG = INT_MAX,                  /* peers waiting to be accepted; the kernel reduces it to net.core.somaxconn */
    RESERVED_FILES = 32,                /* descriptors for other uses than connections */

    /* Times. */
    PREFACE_TIMEOUT_MS = 10 * 1000,     /* from accept to the client's SETTINGS */
    REQUEST_TIMEOUT_MS = 10 * 1000,     /* from HEADERS to the end of the body */
    UNREAD_TIMEOUT_MS = 10 * 1000,      /* from submitting an answer until the peer has taken it */
    DRAIN_TIMEOUT_MS = 5 * 1000,        /* from SIGTERM to exit */
    ACCEPT_PAUSE_MS = 100,              /* out of descriptors: pause before the next accept */
    REFUSED_LOG_MS = 1000,              /* refused peers cause at most one log line in this time */
    MINUTE_MS = 60 * 1000,              /* period of LINES_A_MINUTE, and of a connection's log lines on one method */
    LINES_A_MINUTE = 120,               /* log lines that peers can cause: some 30 megabytes a day at most */
    TIDY_AFTER_MS = 1000,               /* after this time without traffic the heap returns unused memory */
    STALE_RETRY_MS = 100,               /* a server that is starting gets this time between bind and listen */

    /* Memory. */
    ARENA_BYTES = 1024 * 1024,          /* one unpacked message: 64 KiB hold at most some 8,000 fields */
    ARENA_KEEP_BYTES = 64 * 1024,       /* the part of the arena that stays resident */
    HEAP_CLASSES = 6,                   /* blocks of 64 to 2,048 bytes are kept for reuse */
    HEAP_CLASS0_BYTES = 64,             /* size of the smallest class */
    HEAP_KEEP_BYTES = 1024 * 1024,      /* unused blocks that are kept while there is load (TIDY_AFTER_MS) */
    RANDOM_BYTES = 128 * NONCE_BYTES,   /* the most that one getrandom(2) fetches, in a turn of many Encrypts */
    STACK_WIPE_BYTES = 6 * 1024,        /* the deepest stack measured in a turn was 4,384 bytes (s390x) */

    /* Rescue. */
    ENTRY_MAX = 4 * 1024 * 1024,        /* etcd refuses values over 1.5 MiB by default */
    JUDGED_BYTES = 4096,                /* the first bytes of an input, which input_judge looks at */
    V1_NAME_MAX = 1024,                 /* a provider's name in a value of v1 is looked for in these bytes */
    AUDIT_ROWS_MAX = 64,                /* pairs of API and key_id that an audit counts separately */

    LOG_VALUE_MAX = 64,                 /* bytes of a peer's text in a log line; Kubernetes' uids have 36 */
    LOG_LINE_MAX = 1024,                /* under PIPE_BUF: a pipe takes the line whole or not at all */
    UNMAPPED_UID = 65534,               /* the kernel shows this uid when a user namespace lacks the real one */
};

/* ------------------------------------------------------------------- Types
 *
 * Every structure of the server, the service and the sealed form. The comment above a
 * structure states who owns it and which condition always holds.
 *
 * The structures form a tree. The server owns listeners and connections, a connection owns
 * its streams, and a stream owns its request and its answer. `struct kms` has all that an RPC
 * needs, and the server has one. Names follow a rule: _len is the part of a buffer in use,
 * _cap its capacity, _ms a time in milliseconds, _us a time in microseconds.
 *
 * Structures of the client (Probe), the seccomp filter (Confinement), the etcd values (Rescue)
 * and the command line (Options) are not here: they stand in their sections.
 */

/* Levels of log lines. --log-level sets the highest that is written. */
enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

/*
 * Text under construction. Bytes beyond `cap` are dropped, so len <= cap always holds. The
 * structure borrows its buffer, and adds no NUL.
 */
struct text {
    char *buf;
    size_t len, cap;
    bool logfmt; /* write strings as logfmt values, quoted and escaped */
};

/* One field of an encoded protobuf message. It borrows its bytes from the message. */
struct field {
    uint32_t number;
    unsigned wire_type; /* 0 varint, 1 64 bits, 2 length and bytes, 5 32 bits */
    const uint8_t *bytes;
    size_t len;
};

/*
 * A stock of random bytes. Every byte is given out once and wiped at that moment. The stock
 * is empty between turns (random_drop).
 */
struct random {
    size_t left, next; /* bytes in stock; bytes to fetch when the stock is empty */
    uint8_t bytes[RANDOM_BYTES];
};

/*
 * BearSSL's implementations of AES and GCM for this CPU: with the CPU's AES instructions, or
 * in plain C. Their running time depends neither on keys nor on texts. The ring holds the
 * pointers, which point to BearSSL's constants.
 */
struct suite {
    const br_block_ctrcbc_class *aes; /* for a KEK: CBC-MAC over a single block */
    const br_block_ctr_class *ctr;    /* for the key of one message: counter mode */
    br_ghash ghash; /* the hash of GCM */
    const char *name;
};

/* A key encryption key, in the forms in which it is used. The ring owns it. */
struct kek {
    br_aes_gen_ctrcbc_keys aes; /* AES key schedule */
    uint8_t k1[BLOCK_BYTES]; /* first subkey of CMAC */
    uint8_t fingerprint[FINGERPRINT_BYTES]; /* names the KEK in the sealed form */
    char key_id[KEY_ID_LEN + 1]; /* the fingerprint in hex */
};

/*
 * The configured KEKs. The first seals, and all open. ring_new maps pages for it alone, and
 * ring_free wipes them. At least one KEK is present once ring_load has returned.
 */
struct ring {
    struct suite suite;
    int unlocked; /* errno of mlock(2), or 0 if the pages are locked */
    bool unforked; /* a forked child does not get these pages */
    size_t count;
    struct kek keks[KEK_MAX];
    char text[KEK_TEXT_MAX + 1]; /* KMS_KEK, or the content of the file; wiped after parsing */
};

/* The API that a ciphertext belongs to. Its number is authenticated with the ciphertext. */
enum api { API_V1 = 0x01, API_V2 = 0x02 };

/* Results of opening a sealed form. Only OPENED leaves a plaintext. */
enum opened { OPENED, OPEN_MALFORMED, OPEN_UNKNOWN_KEY, OPEN_FORGED };

/* The gRPC status codes in use here (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md). */
enum grpc_code {
    GRPC_OK = 0,
    GRPC_INVALID_ARGUMENT = 3,
    GRPC_DEADLINE_EXCEEDED = 4,
    GRPC_NOT_FOUND = 5,
    GRPC_RESOURCE_EXHAUSTED = 8,
    GRPC_UNIMPLEMENTED = 12,
    GRPC_INTERNAL = 13,
    GRPC_CODES = 17, /* how many codes gRPC defines */
};

/* The RPCs (remote procedure calls) of the two APIs; indexes of the table `rpcs`. */
enum rpc {
    V2_STATUS,
    V2_ENCRYPT,
    V2_DECRYPT,
    V1_VERSION,
    V1_ENCRYPT,
    V1_DECRYPT,
    RPC_UNKNOWN, /* any other path */
    RPCS,
};

/*
 * Memory for one message. Allocations only add to it; one reset wipes and frees all of them.
 * The service owns it.
 */
struct arena {
    uint8_t *base; /* ARENA_BYTES, mapped */
    size_t used;
    bool exhausted; /* an allocation has failed since the last reset */
};

/*
 * The service: everything an RPC needs. It has no socket. It owns the arena; server_free
 * frees the ring for it.
 */
struct kms {
    struct ring *ring;
    struct random random;
    struct arena arena;
    ProtobufCAllocator allocator; /* allocates from the arena */
};

/*
 * The result of an RPC. Its pointers point to constants, into the ring or into the arena.
 * They are valid until kms_done.
 */
struct answer {
    enum grpc_code code;
    const char *message; /* for the client, unless the code is GRPC_OK */
    const uint8_t *bytes; /* with GRPC_OK: the encoded response */
    size_t len;
    const char *uid, *key_id; /* for the log */
    const struct kek *kek; /* the KEK that was used, or NULL */
};

/* Upper bounds of the histogram's buckets in microseconds, and in seconds as Prometheus writes them. */
#define BUCKETS(X)                                                                     \
    X(50, "0.00005") X(100, "0.0001") X(250, "0.00025") X(500, "0.0005") X(1000, "0.001") \
    X(2500, "0.0025") X(5000, "0.005") X(10000, "0.01") X(100000, "0.1") X(1000000, "1")
#define BUCKET_COUNT(us, s) +1
enum { BUCKETS_LEN = 0 BUCKETS(BUCKET_COUNT) };

/* Counters since the start of the program. The server owns them. */
struct metrics {
    uint64_t requests[RPCS][GRPC_CODES];
    uint64_t buckets[RPCS][BUCKETS_LEN + 1]; /* not cumulative; the last is +Inf */
    uint64_t microseconds[RPCS]; /* sum of all durations */
    uint64_t accepted, refused;
    uint64_t start_time_s; /* seconds since 1970 */
    int statm; /* descriptor of /proc/self/statm, or -1 */
};

/* One allocation of the heap. A block is either given out or in the free list of its class. */
struct block {
    uint32_t size; /* bytes asked for */
    uint32_t cost; /* bytes counted, see heap_cost */
    struct block *next; /* in the free list */
    _Alignas(max_align_t) uint8_t bytes[]; /* aligned as malloc aligns */
};

/*
 * Memory for buffers, streams and nghttp2. in_use <= total always holds; the difference is in
 * the free lists. The server owns it.
 */
struct heap {
    struct block *free[HEAP_CLASSES];
    size_t total; /* cost of all blocks */
    size_t in_use; /* cost of the blocks given out */
};

/* The methods that make a difference here. */
enum http_method { METHOD_OTHER, METHOD_POST, METHOD_GET, METHOD_CONNECT };

/*
 * The header fields with a meaning here. A name that begins with a colon is a pseudo-header
 * field: HTTP/2 sends the request line in such fields.
 */
enum field_name {
    FIELD_METHOD,
    FIELD_SCHEME,
    FIELD_PATH,
    FIELD_AUTHORITY,
    FIELD_CONTENT_TYPE,
    FIELD_CONTENT_LENGTH,
    FIELD_TIMEOUT,
    FIELD_TE,
    FIELD_FORBIDDEN, /* RFC 9113 8.2.2: fields of HTTP/1 connections */
    FIELD_OTHER,
};
/* Bit of `seen` for any field that is not a pseudo-header field. */
enum { SEEN_REGULAR = 1 << FIELD_OTHER };

/*
 * The head of a request, judged field by field. It holds verdicts and numbers, and no bytes
 * from the peer. It is part of its stream.
 */
struct request {
    unsigned seen; /* bits 1 << field_name, and SEEN_REGULAR */
    enum http_method method;
    enum rpc rpc; /* RPC_UNKNOWN unless the path names an RPC */
    bool metrics; /* the path is /metrics */
    bool grpc; /* content-type is that of gRPC */
    bool trailers; /* the head is complete: further fields are trailers */
    bool malformed; /* RFC 9113 8.1.1: the stream must be reset */
    bool bad_timeout; /* grpc-timeout is invalid or repeated */
    uint64_t timeout_us; /* grpc-timeout; UINT64_MAX without one */
    uint64_t content_length; /* UINT64_MAX without one */
    size_t field_bytes; /* counted as for FIELDS_MAX_BYTES */
};

/* The states of a stream, in their order. */
enum stream_state {
    STREAM_HEAD, /* the header block is incomplete */
    STREAM_BODY, /* the rest of the request is awaited */
    STREAM_ANSWERED, /* the response is submitted; the rest of the request is dropped */
};

/*
 * One request and its response. The connection owns it, in a doubly linked list: `link`
 * points at the pointer to this stream. body_len <= body_cap and reply_sent <= reply_len
 * always hold.
 */
struct stream {
    struct stream *next, **link;
    struct conn *conn;
    int32_t id;
    enum stream_state state;
    bool ended; /* END_STREAM has come: the request is complete */
    struct request request;
    uint64_t start_us; /* time of the first header frame */
    int64_t deadline_ms; /* for the present state */
    uint64_t received; /* bytes of DATA */
    uint8_t prefix[GRPC_PREFIX_BYTES];
    size_t prefix_len; /* bytes of the prefix that have come */
    uint8_t *body; /* the message, or NULL; a buffer of the connection */
    size_t body_len, body_cap;
    uint8_t *reply; /* the DATA to send, or NULL; a buffer of the connection */
    size_t reply_sent, reply_len;
    bool reply_grpc; /* trailers follow the DATA */
};

/* The resources that peers take. Each has a limit for all connections together. */
enum resource {
    CONNECTIONS, /* open connections */
    STREAMS,  /* open streams */
    BUFFERED, /* bytes of requests and of unread answers */
    HELD,     /* all bytes of the heap: BUFFERED, streams, and the memory of nghttp2's sessions */
    RESOURCES,
};

/*
 * A uid that may connect. `used` is the sum over its connections. The server owns it, and
 * users are never removed.
 */
struct user {
    uid_t uid;
    size_t used[RESOURCES];
    uint64_t uses[RPCS], failures[RPCS]; /* Encrypt and Decrypt requests, and failed ones among them */
    unsigned minute_lines; /* log lines that it has caused in the server's minute */
};

/* The uses of KEKs by one method since the last log line about them. It is part of its connection. */
struct trace {
    const struct kek *kek; /* the KEK of the last use, or NULL */
    unsigned keks; /* bit i: the KEK at place i of the ring has been used before */
    bool several; /* several KEKs were used since the last line */
    uint64_t uses, failures;
    int64_t due_ms; /* time of the next line */
};

/* The kinds of descriptors that epoll watches. */
enum source_kind { SOURCE_SIGNAL, SOURCE_TIMER, SOURCE_LISTENER, SOURCE_CONN };

/*
 * A descriptor that epoll watches. It is the first member of listeners and connections, so a
 * pointer to it is a pointer to them.
 */
struct source {
    enum source_kind kind;
    int fd;
};

/*
 * A socket that accepts connections. The server owns it. If `made` is set, the file is
 * removed at exit, unless another file has taken its place.
 */
struct listener {
    struct source source;
    struct sockaddr_un address;
    socklen_t address_len;
    bool made; /* this program has made the socket's file */
    struct stat file; /* identifies that file */
};

/*
 * One connection. It owns a descriptor, a session, streams and buffers until it is closed;
 * afterwards only the structure is left. The server's list owns the structure, and only
 * server_reap frees it.
 */
struct conn {
    struct source source;
    struct conn *next;
    struct server *server;
    struct user *user;
    nghttp2_session *session;
    struct stream *streams;
    struct stream *head; /* its header block is arriving; RFC 9113 4.3 forbids other frames in between */
    bool closed; /* the structure is freed at the end of the turn */
    bool greeted; /* the client's SETTINGS have come */
    bool writing; /* epoll waits for room to write, and does not report bytes to read */
    bool broken; /* its session ran out of memory, and is not safe to delete */
    uint32_t error; /* the HTTP/2 error code that GOAWAY has told the peer, or 0 */
    struct ucred peer;
    int64_t idle_since_ms;
    int64_t preface_deadline_ms;
    int64_t out_deadline_ms; /* while `out` is not NULL */
    uint8_t *out; /* bytes that the socket did not take; a buffer */
    size_t out_sent, out_len;
    size_t used[RESOURCES];
    size_t unread; /* bytes of answers that are part of used[BUFFERED] */
    size_t unconsumed; /* bytes received by which the window is not yet extended */
    struct trace traces[RPCS];
};

/* The values of --sandbox. */
enum sandbox { SANDBOX_AUTO, SANDBOX_REQUIRE, SANDBOX_OFF };
#ifdef __SANITIZE_ADDRESS__ /* its run-time makes system calls that the filter forbids */
#define SANDBOX_DEFAULT SANDBOX_OFF
#else
#define SANDBOX_DEFAULT SANDBOX_AUTO
#endif

/* The options of the verb serve. Strings are those of the command line. */
struct serve_options {
    const char *endpoints[LISTENERS_MAX];
    size_t endpoint_count;
    mode_t mode;
    gid_t group;
    bool has_group;
    uid_t uids[ALLOWED_UIDS_MAX];
    size_t uid_count;
    size_t max_connections;
    enum sandbox sandbox;
};

/*
 * The server: all of its state. There is one, and it exists until the program ends; nghttp2's
 * callbacks reach it through their connection. It owns everything below except the options.
 */
struct server {
    const struct serve_options *options;
    struct kms kms;
    struct metrics metrics;
    struct heap heap;
    int epoll;
    struct source signals, timer;
    int notify; /* socket of the service manager, or -1 */
    struct listener listeners[LISTENERS_MAX];
    size_t listener_count;
    struct conn *conns;
    struct user users[ALLOWED_UIDS_MAX];
    size_t user_count;
    size_t used[RESOURCES], limit[RESOURCES]; /* sums over the open connections, and their limits */
    uint8_t *page; /* the text of /metrics, rendered once in a turn; from malloc */
    size_t page_len;
    nghttp2_session_callbacks *callbacks;
    nghttp2_option *session_options;
    int64_t now_ms; /* monotonic time at the start of this turn */
    uint64_t now_us;
    int64_t next_ms; /* nothing is due before this time; INT64_MAX: nothing is due */
    int64_t timer_ms; /* expiry of the timer; INT64_MAX: it is not set */
    int64_t active_ms; /* the last turn with work */
    int64_t resume_accept_ms, drain_ms; /* ends of the pause and of the drain; INT64_MAX: there is none */
    int64_t refused_logged_ms; /* the last line of refused peers */
    uint64_t refused_unlogged; /* peers refused since that line */
    int64_t minute_ms; /* start of the minute in which log lines are counted */
    uint64_t lines_left_out; /* further lines in that minute, not written */
    struct ucred refused_peer; /* the last refused peer */
    size_t share; /* bytes to read from one peer in this turn */
    size_t out_len; /* bytes of `out` in use */
    uint8_t in[IN_BYTES], out[OUT_BYTES];
};

/* -------------------------------------------------------------------- Text
 *
 * Text for people: log lines, sentences on stderr, output of the verbs. The small printf
 * below formats it.
 *
 * The printf knows %s %.*s %c %d %u %x %lu %llu %zu, %% and widths padded with zeros. The
 * compiler checks its arguments as it does for printf. (stdio's printf would be a tenth of
 * the static binary.) Log lines are logfmt: key=value pairs, the time (RFC 3339, UTC) first.
 * In a log line the printf writes every %s as a logfmt value, quoted and escaped where
 * necessary, so that a peer can forge neither a line nor a pair.
 *
 * This section allocates no memory, and log_line never waits for a reader of the log. Nothing
 * here parses text: the sections Bytes, Endpoints and Options do.
 */

static enum log_level log_level = LOG_INFO;

/* Adds one byte, or drops it when the text is full. */
static void text_char(struct text *t, char c) {
    if (t->len < t->cap)
        t->buf[t->len++] = c;
}

static void text_bytes(struct text *t, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++)
        text_char(t, s[i]);
}

/*
 * Adds n bytes that a peer or a file may have chosen. Printable ASCII stays as it is. Every
 * other byte becomes \xNN, including C1 controls and the bytes of UTF-8. A terminal that
 * shows the text therefore receives no control sequences.
 */
static void text_escaped(struct text *t, const char *s, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint8_t c = (uint8_t)s[i];
        if (c >= ' ' && c < 0x7f) {
            text_char(t, (char)c);
        } else {
            text_bytes(t, "\\x", 2);
            text_char(t, "0123456789abcdef"[c >> 4]);
            text_char(t, "0123456789abcdef"[c & 15]);
        }
    }
}

/* Adds a logfmt value of n bytes: as it is if it is plain, else in quotes and escaped. */
static void text_value(struct text *t, const char *s, size_t n) {
    bool plain = n > 0;
    for (size_t i = 0; i < n && plain; i++)
        plain = s[i] > ' ' && s[i] < 0x7f && s[i] != '"' && s[i] != '=' && s[i] != '\\';
    if (plain) {
        text_bytes(t, s, n);
        return;
    }
    text_char(t, '"');
    for (size_t i = 0; i < n; i++) {
        if (s[i] == '"' || s[i] == '\\')
            text_char(t, '\\');
        text_escaped(t, &s[i], 1);
    }
    text_char(t, '"');
}

/* Adds a number in the given base (10 or 16), padded with zeros to `width` digits. */
static void text_number(struct text *t, unsigned long long n, unsigned base, int width) {
    char digits[24];
    int len = 0;
    do
        digits[len++] = "0123456789abcdef"[n % base];
    while ((n /= base) > 0);
    for (; width > len; width--)
        text_char(t, '0');
    while (len > 0)
        text_char(t, digits[--len]);
}

/*
 * Adds text by a format, see the head of this section. A %s is a logfmt value if t->logfmt is
 * set. Conversions outside the list are not detected.
 */
static void text_vadd(struct text *t, const char *format, va_list args) {
    for (const char *f = format; *f; f++) {
        if (*f != '%') {
            text_char(t, *f);
            continue;
        }
        int width = 0, longs = 0, precision = -1;
        for (f++; *f >= '0' && *f <= '9'; f++)
            width = 10 * width + (*f - '0');
        if (*f == '.') {
            precision = va_arg(args, int);
            f += 2; /* ".*" */
        }
        for (; *f == 'l' || *f == 'z'; f++)
            longs += *f == 'l' ? 1 : 3;
        if (*f == 's') {
            const char *s = va_arg(args, const char *);
            size_t n = precision < 0 ? strlen(s) : strnlen(s, (size_t)precision);
            (t->logfmt ? text_value : text_bytes)(t, s, n);
        } else if (*f == 'c') {
            text_char(t, (char)va_arg(args, int));
        } else if (*f == '%') {
            text_char(t, '%');
        } else if (*f == 'd') {
            int n = va_arg(args, int);
            if (n < 0)
                text_char(t, '-');
            text_number(t, n < 0 ? 0u - (unsigned)n : (unsigned)n, 10, width);
        } else { /* u, x */
            unsigned long long n = longs == 3   ? va_arg(args, size_t)
                                   : longs == 2 ? va_arg(args, unsigned long long)
                                   : longs == 1 ? va_arg(args, unsigned long)
                                                : va_arg(args, unsigned);
            text_number(t, n, *f == 'x' ? 16 : 10, width);
        }
    }
}

__attribute__((format(printf, 2, 3)))
static void text_add(struct text *t, const char *format, ...) {
    va_list args;
    va_start(args, format);
    text_vadd(t, format, args);
    va_end(args);
}

/* Copies len bytes to `out` and adds a NUL. Bytes beyond cap - 1 are cut off. */
static void copy_text(char *out, size_t cap, const uint8_t *value, size_t len) {
    if (len > cap - 1)
        len = cap - 1;
    memcpy(out, value, len);
    out[len] = '\0';
}

/* Writes len bytes. Returns 0, or -1 with errno; a part may have been written then. */
static int write_all(int fd, const void *bytes, size_t len) {
    const uint8_t *at = bytes;
    while (len > 0) {
        ssize_t n = write(fd, at, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -1;
        at += n;
        len -= (size_t)n;
    }
    return 0;
}

/* Blocks SIGPIPE. Writing to a peer that has gone then fails with EPIPE instead of ending the program. */
static void sigpipe_block(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    sigprocmask(SIG_BLOCK, &set, NULL);
}

/*
 * Prints on stdout or stderr by a format, at most 4,096 bytes. Ends the program with status 1
 * if stdout fails. Verbs use it; the running server never does.
 */
__attribute__((format(printf, 2, 3)))
static void print(int fd, const char *format, ...) {
    char buf[4096];
    struct text t = {.buf = buf, .cap = sizeof buf};
    va_list args;
    va_start(args, format);
    text_vadd(&t, format, args);
    va_end(args);
    if (write_all(fd, buf, t.len) < 0 && fd == STDOUT_FILENO) {
        print(STDERR_FILENO, "kmsplugin: standard output: %s\n", strerror(errno));
        exit(1);
    }
}

/*
 * Writes one sentence to stderr. It may contain a peer's words or those of the command line,
 * so it is escaped. If the reader of stderr has stopped, the sentence is dropped after a
 * second, so that the process can end.
 */
static void complain(const char *format, va_list args) {
    struct pollfd room = {.fd = STDERR_FILENO, .events = POLLOUT};
    const struct timespec patience = {.tv_sec = 1};
    char words[LOG_LINE_MAX], line[4 * LOG_LINE_MAX];
    struct text t = {.buf = words, .cap = sizeof words}, escaped = {.buf = line, .cap = sizeof line - 1};
    text_add(&t, "kmsplugin: ");
    text_vadd(&t, format, args);
    text_escaped(&escaped, words, t.len);
    line[escaped.len++] = '\n';
    if (ppoll(&room, 1, &patience, NULL) != 0)
        write_all(STDERR_FILENO, line, escaped.len);
}

/* Writes one sentence to stderr. */
__attribute__((format(printf, 1, 2)))
static void note(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args);
    va_end(args);
}

/* Ends the program with one sentence on stderr and exit status 1. */
__attribute__((format(printf, 1, 2), noreturn))
static void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args);
    va_end(args);
    exit(1);
}

/* Ends the program after wrong usage: one sentence and a hint on stderr, exit status 2. */
__attribute__((format(printf, 1, 2), noreturn))
static void die_usage(const char *format, ...) {
    va_list args;
    va_start(args, format);
    complain(format, args);
    va_end(args);
    print(STDERR_FILENO, "Try 'kmsplugin --help'.\n");
    exit(2);
}

/*
 * Adds a time as in RFC 3339, in UTC, with milliseconds. gmtime_r would add the code for time
 * zones to the static binary, and glibc's version reads a file. The calculation here lets
 * years begin in March: a leap day is then the last day of its year, and any five months in a
 * row up to January have 153 days. The formula for `year` takes the leap days off `day`, and
 * then divides by 365.
 */
static void text_time(struct text *t, const struct timespec *time) {
    enum { YEAR = 365, FOUR_YEARS = 4 * YEAR + 1, CENTURY = 25 * FOUR_YEARS - 1, ERA = 4 * CENTURY + 1 };
    enum { BEFORE_1970 = 719468 }; /* days since 1 March of the year 0 */
    unsigned long long seconds = (unsigned long long)time->tv_sec, days = seconds / 86400 + BEFORE_1970;
    unsigned day = (unsigned)(days % ERA), second = (unsigned)(seconds % 86400);
    unsigned year = (day - day / (FOUR_YEARS - 1) + day / CENTURY - day / (ERA - 1)) / YEAR;
    day -= YEAR * year + year / 4 - year / 100;
    unsigned month = (5 * day + 2) / 153; /* 0: March */
    day -= (153 * month + 2) / 5;
    year += 400 * (unsigned)(days / ERA) + month / 10;
    text_add(t, "%04u-%02u-%02uT%02u:%02u:%02u.%03uZ", year, (month + 2) % 12 + 1, day + 1,
             second / 3600, second / 60 % 60, second % 60, (unsigned)(time->tv_nsec / 1000000));
}

/*
 * Writes one log line: the time, the level, then the pairs of `format`, of which the first is
 * "msg=...". Lines above the chosen level are not written. A line is dropped when stderr
 * cannot take it at once, because a log reader that has stopped must not stop the server.
 */
__attribute__((format(printf, 2, 3)))
static void log_line(enum log_level level, const char *format, ...) {
    if (level > log_level)
        return;
    struct pollfd room = {.fd = STDERR_FILENO, .events = POLLOUT};
    const struct timespec at_once = {0, 0};
    if (ppoll(&room, 1, &at_once, NULL) < 1 || !(room.revents & POLLOUT))
        return;
    char buf[LOG_LINE_MAX];
    struct text t = {.buf = buf, .cap = sizeof buf - 1, .logfmt = true};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    static const char *const names[] = {"error", "warn", "info", "debug"};
    text_add(&t, "time=");
    text_time(&t, &now);
    text_add(&t, " level=%s ", names[level]);
    va_list args;
    va_start(args, format);
    text_vadd(&t, format, args);
    va_end(args);
    buf[t.len++] = '\n';
    while (write(STDERR_FILENO, buf, t.len) < 0 && errno == EINTR)
        continue;
}

/* ------------------------------------------------------------------- Bytes
 *
 * Small functions on bytes: wiping, hex, base64, UTF-8, protobuf fields, random bytes, and
 * the clock.
 *
 * base64_decode reads keys. It has neither branches nor array indexes that depend on a key,
 * because these would change its running time, and an attacker may measure time. Functions
 * for a peer's bytes check every length before they read.
 *
 * A protobuf message is a sequence of fields. A field is a tag, which is a field number and a
 * wire type, and a value. A varint is a number in groups of seven bits, low group first; the
 * top bit of each byte is set if another byte follows.
 *
 * Nothing here packs or unpacks a whole message: protobuf-c does.
 */

/*
 * Overwrites bytes that must not stay in memory. The asm statement tells the compiler that
 * the zeros are read, so it cannot remove the memset.
 */
static void wipe(void *bytes, size_t len) {
    memset(bytes, 0, len);
    __asm__ volatile("" : : "r"(bytes) : "memory");
}

/*
 * Overwrites the stack below the caller, where BearSSL's functions have left round keys and
 * plaintext. The function is never inlined: its array then covers the stack that they used.
 */
__attribute__((noinline))
static void stack_wipe(void) {
    uint8_t below[STACK_WIPE_BYTES];
    wipe(below, sizeof below);
}

/* Writes 2 * len hex digits and a NUL. */
static void hex_encode(const uint8_t *bytes, size_t len, char *out) {
    for (size_t i = 0; i < len; i++) {
        *out++ = "0123456789abcdef"[bytes[i] >> 4];
        *out++ = "0123456789abcdef"[bytes[i] & 15];
    }
    *out = '\0';
}

/* All ones if low <= c <= high, else 0. It has no branch. All three are below 2^31. */
static unsigned in_range(unsigned c, unsigned low, unsigned high) {
    return 0u - (((low - 1 - c) & (c - high - 1)) >> 31);
}

/*
 * Reads a decimal number from a file of the kernel. Skips blanks before it, and moves *at
 * past it. Returns 0 if no digit is there.
 */
static uint64_t number_next(const char **at) {
    uint64_t n = 0;
    while (**at == ' ')
        ++*at;
    for (; **at >= '0' && **at <= '9'; ++*at)
        n = 10 * n + (uint64_t)(**at - '0');
    return n;
}

/* Microseconds of the monotonic clock, which nobody can set. */
static int64_t monotonic_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/*
 * Decodes base64 with padding in its canonical form (RFC 4648 section 4). Returns the number
 * of bytes decoded, or -1 if the text is invalid. Writes them only if there are at most
 * `cap`. The text is a key, so no branch and no index depends on it, except on its padding.
 */
static long base64_decode(const char *text, size_t len, uint8_t *out, size_t cap) {
    if (len == 0 || len % 4 != 0)
        return -1;
    size_t padding = text[len - 1] != '=' ? 0 : text[len - 2] != '=' ? 1 : 2;
    size_t total = len / 4 * 3 - padding, n = 0;
    uint32_t bits = 0, bad = 0;
    for (size_t i = 0; i < len; i++) {
        unsigned c = (uint8_t)text[i];
        unsigned value = (in_range(c, 'A', 'Z') & (c - 'A')) | (in_range(c, 'a', 'z') & (c - 'a' + 26)) |
                         (in_range(c, '0', '9') & (c - '0' + 52)) | (in_range(c, '+', '+') & 62) |
                         (in_range(c, '/', '/') & 63);
        unsigned known = in_range(c, 'A', 'Z') | in_range(c, 'a', 'z') | in_range(c, '0', '9') |
                         in_range(c, '+', '+') | in_range(c, '/', '/');
        if (i >= len - padding)
            value = 0, known = ~0u;
        bad |= ~known;
        bits = bits << 6 | value;
        for (int shift = 16; i % 4 == 3 && shift >= 0; shift -= 8, n++)
            if (total <= cap && n < total)
                out[n] = (uint8_t)(bits >> shift);
    }
    bad |= bits & ((1u << 8 * padding) - 1); /* the unused bits of the last digit must be 0 */
    return bad ? -1 : (long)total;
}

/*
 * Writes base64 with padding, and a NUL. Its array indexes depend on the bytes: it serves
 * genkey alone, which prints them.
 */
static void base64_encode(const uint8_t *bytes, size_t len, char *out) {
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (; len > 0; bytes += 3, len -= len < 3 ? len : 3) {
        uint32_t bits = (uint32_t)bytes[0] << 16 | (len > 1 ? (uint32_t)bytes[1] << 8 : 0) |
                        (len > 2 ? bytes[2] : 0u);
        *out++ = alphabet[bits >> 18];
        *out++ = alphabet[bits >> 12 & 63];
        *out++ = len > 1 ? alphabet[bits >> 6 & 63] : '=';
        *out++ = len > 2 ? alphabet[bits & 63] : '=';
    }
    *out = '\0';
}

/*
 * Checks for UTF-8 as in RFC 3629, which forbids surrogates and overlong forms. Returns 0, or
 * 1 if the bytes contain a NUL, or -1 if they are not UTF-8.
 */
static int utf8_check(const uint8_t *s, size_t len) {
    int nul = 0;
    for (size_t i = 0; i < len;) {
        uint8_t c = s[i++];
        if (c > 0 && c < 0x80)
            continue;
        if (c == 0) {
            nul = 1;
            continue;
        }
        size_t more = c >= 0xc2 && c <= 0xdf ? 1 : c >= 0xe0 && c <= 0xef ? 2 : c >= 0xf0 && c <= 0xf4 ? 3 : 0;
        if (more == 0 || len - i < more)
            return -1;
        uint8_t low = c == 0xe0 ? 0xa0 : c == 0xf0 ? 0x90 : 0x80;
        uint8_t high = c == 0xed ? 0x9f : c == 0xf4 ? 0x8f : 0xbf;
        for (; more > 0; more--, low = 0x80, high = 0xbf)
            if (s[i] < low || s[i++] > high)
                return -1;
    }
    return nul;
}

/*
 * Reads a varint of at most ten bytes and moves *at past it. Returns 0, or -1 if the varint
 * does not end in time.
 */
static int varint_next(const uint8_t **at, const uint8_t *end, uint64_t *value) {
    *value = 0;
    for (unsigned shift = 0; shift < 64 && *at < end; shift += 7) {
        uint8_t byte = *(*at)++;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return 0;
    }
    return -1;
}

/*
 * Reads the field at *at and moves *at past it. Returns 1, or 0 at the end of the message, or
 * -1 if the bytes are not a message (protobuf.dev/programming-guides/encoding).
 */
static int field_next(const uint8_t **at, const uint8_t *end, struct field *f) {
    if (*at == end)
        return 0;
    uint64_t tag, len;
    if (varint_next(at, end, &tag) < 0 || tag >> 3 == 0 || tag > UINT32_MAX)
        return -1;
    f->number = (uint32_t)(tag >> 3);
    f->wire_type = tag & 7;
    const uint8_t *start = *at;
    switch (f->wire_type) {
    case 0:
        if (varint_next(at, end, &len) < 0)
            return -1;
        len = (uint64_t)(*at - start);
        break;
    case 1:
        len = 8;
        break;
    case 2:
        if (varint_next(at, end, &len) < 0)
            return -1;
        start = *at;
        break;
    case 5:
        len = 4;
        break;
    default: /* groups, out of use since 2008 */
        return -1;
    }
    if (len > (uint64_t)(end - start))
        return -1;
    f->bytes = start;
    f->len = (size_t)len;
    *at = start + len;
    return 1;
}

/*
 * Checks the strings of a message, because protobuf-c does not. Returns 0 if all are valid C
 * strings; 1 if one contains a NUL, at which C would end it; -1 if one is not UTF-8 or the
 * bytes are not a message.
 */
static int strings_check(const ProtobufCMessageDescriptor *type, const uint8_t *bytes, size_t len) {
    const uint8_t *end = bytes + len;
    struct field f;
    int more, nul = 0;
    while ((more = field_next(&bytes, end, &f)) > 0) {
        unsigned i = 0;
        while (i < type->n_fields && type->fields[i].id != f.number)
            i++;
        if (i == type->n_fields || f.wire_type != 2)
            continue;
        const ProtobufCFieldDescriptor *known = &type->fields[i];
        int verdict = known->type == PROTOBUF_C_TYPE_STRING    ? utf8_check(f.bytes, f.len)
                      : known->type == PROTOBUF_C_TYPE_MESSAGE ? strings_check(known->descriptor, f.bytes, f.len)
                                                               : 0; /* kms.proto nests one level */
        if (verdict < 0)
            return -1;
        nul |= verdict;
    }
    return more < 0 ? -1 : nul;
}

/*
 * Calls getrandom(2) directly. The function of glibc, from 2.41 on, keeps random bytes for
 * later calls in this process's memory, and a snapshot of a virtual machine would copy them.
 */
static ssize_t random_get(uint8_t *out, size_t len, unsigned flags) {
    return syscall(SYS_getrandom, out, len, flags);
}

/* Fills `out` with random bytes. Returns 0, or -1 with errno if the kernel refuses. */
static int random_fill(uint8_t *out, size_t len) {
    while (len > 0) {
        ssize_t n = random_get(out, len, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return -1;
        out += n;
        len -= (size_t)n;
    }
    return 0;
}

/*
 * Takes a fresh nonce from the stock. An empty stock is filled by getrandom(2): with one nonce
 * the first time in a turn, and each further time with twice as many as before, up to
 * RANDOM_BYTES. A getrandom(2) for every nonce would cost a quarter of the CPU time under
 * load. Returns 0, or -1 if the kernel refuses.
 */
static int random_nonce(struct random *r, uint8_t nonce[NONCE_BYTES]) {
    if (r->left == 0) {
        size_t n = r->next < NONCE_BYTES ? NONCE_BYTES : r->next;
        if (random_fill(r->bytes, n) < 0)
            return -1;
        r->left = n;
        r->next = 2 * n < sizeof r->bytes ? 2 * n : sizeof r->bytes;
    }
    r->left -= NONCE_BYTES;
    memcpy(nonce, r->bytes + r->left, NONCE_BYTES);
    wipe(r->bytes + r->left, NONCE_BYTES);
    return 0;
}

/*
 * Wipes the stock at the end of a turn. A virtual machine or a container can be restored from
 * a snapshot more than once. Every copy would then use the same nonces from the stock, and
 * two messages under one nonce reveal the XOR of their data keys.
 */
static void random_drop(struct random *r) {
    wipe(r->bytes, r->left);
    r->left = r->next = 0;
}

/* ------------------------------------------------------------------ Memory
 *
 * Two allocators, the heap and the arena, which count memory and wipe it after use.
 *
 * The heap serves nghttp2, which allocates and frees about ten small blocks for each request.
 * It counts them, wipes each freed block, and keeps freed blocks in a list for each size
 * class. (With malloc alone an Encrypt takes 44 to 57 % more CPU time.) Kept blocks come from
 * malloc, and return to it when the load is over.
 *
 * The arena serves protobuf-c. One message is unpacked into it and the answer is built there;
 * then the whole arena is freed at once.
 *
 * This section sets no limit for a peer. Section Room does.
 */

/*
 * The class of a block for `size` bytes. Blocks of class 0 have HEAP_CLASS0_BYTES, and those
 * of each further class have twice as many. A result of HEAP_CLASSES or more means that no
 * class is large enough.
 */
static unsigned heap_class(size_t size) {
    enum { LONG_BITS = 8 * sizeof(unsigned long) };
    unsigned long half_classes = ((size - 1) | (HEAP_CLASS0_BYTES - 1)) / (HEAP_CLASS0_BYTES / 2);
    return LONG_BITS - 1 - (unsigned)__builtin_clzl(half_classes);
}

/* The capacity of a block for `size` bytes: that of its class if it has one, else `size`. */
static size_t heap_cap(size_t size) {
    unsigned class = heap_class(size);
    return class < HEAP_CLASSES ? (size_t)HEAP_CLASS0_BYTES << class : size;
}

/* The memory that a block for `size` bytes takes, including malloc's own header. Limits count this number. */
static size_t heap_cost(size_t size) {
    enum { MALLOC_BYTES = 16 };
    return sizeof(struct block) + MALLOC_BYTES + heap_cap(size);
}

/* The block whose bytes heap_new has returned. */
static struct block *block_of(void *bytes) {
    return (struct block *)((char *)bytes - offsetof(struct block, bytes));
}

/* The cost of the block whose bytes heap_new has returned. */
static size_t block_cost(void *bytes) {
    return block_of(bytes)->cost;
}

static void block_free(struct heap *h, struct block *b) {
    h->total -= b->cost;
    free(b);
}

/* Returns all kept blocks to malloc. */
static void heap_tidy(struct heap *h) {
    for (unsigned class = 0; class < HEAP_CLASSES; class++) {
        for (struct block *b; (b = h->free[class]);) {
            h->free[class] = b->next;
            block_free(h, b);
        }
    }
}

/*
 * Makes a new block with malloc. If malloc fails, the kept blocks are freed and malloc is
 * called once more. Returns the bytes of the block, or NULL.
 */
static void *block_new(struct heap *h, size_t size) {
    struct block *b = NULL;
    if (size <= HEAP_MAX && !(b = malloc(sizeof *b + heap_cap(size)))) {
        heap_tidy(h);
        b = malloc(sizeof *b + heap_cap(size));
    }
    if (!b)
        return NULL;
    b->size = (uint32_t)size;
    b->cost = (uint32_t)heap_cost(size);
    h->total += b->cost;
    h->in_use += b->cost;
    return b->bytes;
}

/*
 * Allocates at least `size` bytes. Returns NULL if malloc fails or `size` is over HEAP_MAX.
 * The content of the bytes is not defined.
 */
static void *heap_new(struct heap *h, size_t size) {
    unsigned class = heap_class(size);
    struct block *b = class < HEAP_CLASSES ? h->free[class] : NULL;
    if (!b)
        return block_new(h, size);
    h->free[class] = b->next;
    b->size = (uint32_t)size;
    h->in_use += b->cost;
    return b->bytes;
}

/* Wipes the bytes, and keeps their block if it has a class and HEAP_KEEP_BYTES permits it. */
static void heap_free(struct heap *h, void *bytes) {
    struct block *b = block_of(bytes);
    unsigned class = heap_class(b->size);
    wipe(bytes, b->size);
    h->in_use -= b->cost;
    if (class >= HEAP_CLASSES || h->total - h->in_use > HEAP_KEEP_BYTES) {
        block_free(h, b);
        return;
    }
    b->next = h->free[class];
    h->free[class] = b;
}

/* Maps the arena. Returns 0, or -1 with errno. */
static int arena_init(struct arena *a) {
    a->used = 0;
    a->exhausted = false;
    a->base = mmap(NULL, ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return a->base == MAP_FAILED ? -1 : 0;
}

/*
 * Allocates `size` bytes until the next reset, aligned for any type. Returns NULL when the
 * arena is full. The signature is protobuf-c's.
 */
static void *arena_new(void *arena, size_t size) {
    struct arena *a = arena;
    if (size > ARENA_BYTES - a->used || (size = (size + 15) & ~(size_t)15) > ARENA_BYTES - a->used) {
        a->exhausted = true;
        return NULL;
    }
    void *p = a->base + a->used;
    a->used += size;
    return p;
}

/* Shortens the last allocation so that it ends at `end`. */
static void arena_trim(struct arena *a, const uint8_t *end) {
    a->used = ((size_t)(end - a->base) + 15) & ~(size_t)15;
}

/* Does nothing: arena_reset frees everything at once. The signature is protobuf-c's. */
static void arena_free(void *arena, void *p) {
    (void)arena;
    (void)p;
}

/* Wipes the used part and frees all of it. Used pages above ARENA_KEEP_BYTES go back to the kernel. */
static void arena_reset(struct arena *a) {
    size_t keep = a->used < ARENA_KEEP_BYTES ? a->used : ARENA_KEEP_BYTES;
    wipe(a->base, keep);
    if (a->used > keep)
        madvise(a->base + keep, ARENA_BYTES - keep, MADV_DONTNEED); /* they read as zero from now on */
    a->used = 0;
    a->exhausted = false;
}

/* ----------------------------------------------------------------- Sealing
 *
 * Sealing encrypts a DEK so that only the holder of the KEK can read it or change it. The
 * result is the sealed form, which etcd may keep for years:
 *
 *     offset  bytes  content
 *     0       1      format, 0x01
 *     1       16     key fingerprint: names the KEK
 *     17      24     nonce
 *     41      n      ciphertext
 *     41+n    16     tag
 *
 * The algorithm is XAES-256-GCM (C2SP). It derives a fresh AES key for each message from the
 * KEK and the first half of the nonce N. It then encrypts with AES-256-GCM (NIST SP 800-38D)
 * under that key, and the second half of N is the nonce. Random nonces are therefore safe for
 * any practical number of messages, while plain AES-GCM needs a new key before 2^32 messages.
 *
 *     L  = AES(KEK, 0)                 K1 = L shifted left by one bit, and xor 0x87
 *                                           if the bit shifted out was 1 (CMAC)
 *     Kx = AES(KEK, (00 01 58 00 || N[0..11]) xor K1) ||      || joins byte strings
 *          AES(KEK, (00 02 58 00 || N[0..11]) xor K1)
 *     ciphertext, tag = AES-256-GCM(key Kx, nonce N[12..23])
 *
 * The tag authenticates the ciphertext and the associated data. Associated data is the header
 * (format and fingerprint) and one byte for the API. A ciphertext of v1 therefore never opens
 * in v2, and a ciphertext of v2 never in v1.
 *
 * This section does not know where keys come from, and it does not hide the length of a DEK.
 */

/*
 * Chooses BearSSL's implementations: AES instructions if the CPU has them, else C code for
 * words of 64 or 32 bits.
 */
static struct suite suite_choose(void) {
    struct suite s = {br_aes_x86ni_ctrcbc_get_vtable(), br_aes_x86ni_ctr_get_vtable(), br_ghash_pclmul_get(), "aesni"};
    if (s.aes && s.ctr && s.ghash)
        return s;
    if (sizeof(void *) == 8)
        return (struct suite){&br_aes_ct64_ctrcbc_vtable, &br_aes_ct64_ctr_vtable, br_ghash_ctmul64, "ct64"};
    return (struct suite){&br_aes_ct_ctrcbc_vtable, &br_aes_ct_ctr_vtable, br_ghash_ctmul, "ct32"};
}

/*
 * block = AES(key, block xor mask). BearSSL has no function for a single block, so this is
 * one step of CBC-MAC.
 */
static void aes_block(const br_aes_gen_ctrcbc_keys *key, const uint8_t mask[BLOCK_BYTES], uint8_t block[BLOCK_BYTES]) {
    key->vtable->mac(&key->vtable, block, mask, BLOCK_BYTES);
}

/*
 * AES-GCM (NIST SP 800-38D) of len bytes under a key of 16, 24 or 32 bytes. Sealing writes
 * the ciphertext and the tag, len + TAG_BYTES in all. Opening reads the tag after the
 * ciphertext and compares it in constant time. Returns 0, or -1 for a wrong tag; `out` then
 * holds zeros. `in` and `out` must not overlap.
 */
static int gcm_crypt(const struct suite *suite, bool seal, const uint8_t *key, size_t key_len,
                     const uint8_t nonce[12], const uint8_t *aad, size_t aad_len,
                     const uint8_t *in, size_t len, uint8_t *out) {
    br_aes_gen_ctr_keys aes;
    br_gcm_context gcm;
    int result = 0;
    suite->ctr->init(&aes.vtable, key, key_len);
    br_gcm_init(&gcm, &aes.vtable, suite->ghash);
    br_gcm_reset(&gcm, nonce, 12);
    br_gcm_aad_inject(&gcm, aad, aad_len);
    br_gcm_flip(&gcm);
    if (len > 0)
        memcpy(out, in, len);
    br_gcm_run(&gcm, seal, out, len);
    if (seal) {
        br_gcm_get_tag(&gcm, out + len);
    } else if (!br_gcm_check_tag(&gcm, in + len)) {
        wipe(out, len);
        result = -1;
    }
    wipe(&aes, sizeof aes);
    wipe(&gcm, sizeof gcm);
    return result;
}

/*
 * XAES-256-GCM: derives the message key Kx from the KEK and the nonce, and calls gcm_crypt
 * with it. Arguments and result are as there.
 */
static int xaes_crypt(const struct suite *suite, bool seal, const struct kek *kek,
                      const uint8_t nonce[NONCE_BYTES], const uint8_t *aad, size_t aad_len,
                      const uint8_t *in, size_t len, uint8_t *out) {
    uint8_t key[KEK_BYTES];
    for (uint8_t half = 0; half < 2; half++) {
        uint8_t *block = key + half * BLOCK_BYTES;
        const uint8_t counter[4] = {0x00, half + 1, 0x58, 0x00};
        memcpy(block, counter, sizeof counter);
        memcpy(block + sizeof counter, nonce, 12);
        aes_block(&kek->aes, kek->k1, block);
    }
    int result = gcm_crypt(suite, seal, key, sizeof key, nonce + 12, aad, aad_len, in, len, out);
    wipe(key, sizeof key);
    return result;
}

/* HMAC-SHA-256 (RFC 2104), the first out_len bytes of it, at most 32. */
static void hmac_sha256(const uint8_t *key, size_t key_len, const void *data, size_t len,
                        uint8_t *out, size_t out_len) {
    br_hmac_key_context kc;
    br_hmac_context hc;
    br_hmac_key_init(&kc, &br_sha256_vtable, key, key_len);
    br_hmac_init(&hc, &kc, out_len);
    br_hmac_update(&hc, data, len);
    br_hmac_out(&hc, out);
    wipe(&kc, sizeof kc);
    wipe(&hc, sizeof hc);
}

/*
 * Sets up a KEK from its 32 bytes, which the caller wipes. The fingerprint is an HMAC of a
 * fixed label under the KEK, and does not reveal the KEK.
 */
static void kek_init(struct kek *kek, const struct suite *suite, const uint8_t key[KEK_BYTES]) {
    static const char label[] = "kmsplugin key_id v1";
    const uint8_t zero[BLOCK_BYTES] = {0};
    uint8_t l[BLOCK_BYTES] = {0};
    suite->aes->init(&kek->aes.vtable, key, KEK_BYTES);
    aes_block(&kek->aes, zero, l);
    for (size_t i = 0; i < BLOCK_BYTES; i++)
        kek->k1[i] = (uint8_t)(l[i] << 1 | (i + 1 < BLOCK_BYTES ? l[i + 1] >> 7 : 0));
    kek->k1[BLOCK_BYTES - 1] ^= (uint8_t)(0x87 & (0u - (l[0] >> 7)));
    wipe(l, sizeof l);
    hmac_sha256(key, KEK_BYTES, label, sizeof label - 1, kek->fingerprint, FINGERPRINT_BYTES);
    hex_encode(kek->fingerprint, FINGERPRINT_BYTES, kek->key_id);
}

/*
 * The KEK with this fingerprint, or NULL. Fingerprints are not secret, so the time of the
 * comparison may depend on them.
 */
static const struct kek *ring_find(const struct ring *ring, const uint8_t fingerprint[FINGERPRINT_BYTES]) {
    for (size_t i = 0; i < ring->count; i++)
        if (memcmp(ring->keks[i].fingerprint, fingerprint, FINGERPRINT_BYTES) == 0)
            return &ring->keks[i];
    return NULL;
}

/* Writes the associated data of a sealed form that begins at `sealed`. */
static void sealed_aad(const uint8_t *sealed, enum api api, uint8_t aad[HEADER_BYTES + 1]) {
    memcpy(aad, sealed, HEADER_BYTES);
    aad[HEADER_BYTES] = (uint8_t)api;
}

/*
 * Seals len bytes under the first KEK of the ring. `out` has room for len + SEALED_OVERHEAD
 * bytes. Returns 0, or -1 if the kernel gives no random bytes.
 */
static int seal(const struct ring *ring, struct random *random, enum api api,
                const uint8_t *plaintext, size_t len, uint8_t *out) {
    uint8_t *nonce = out + HEADER_BYTES, aad[HEADER_BYTES + 1];
    out[0] = SEALED_FORMAT;
    memcpy(out + 1, ring->keks[0].fingerprint, FINGERPRINT_BYTES);
    if (random_nonce(random, nonce) < 0)
        return -1;
    sealed_aad(out, api, aad);
    xaes_crypt(&ring->suite, true, &ring->keks[0], nonce, aad, sizeof aad, plaintext, len, nonce + NONCE_BYTES);
    return 0;
}

/* Whether length and format byte are those of a sealed form. */
static bool sealed_shaped(const uint8_t *sealed, size_t len) {
    return len >= SEALED_OVERHEAD && sealed[0] == SEALED_FORMAT;
}

/*
 * Opens the result of seal(). `out` has room for len - SEALED_OVERHEAD bytes. The plaintext
 * is valid only if the result is OPENED.
 */
static enum opened open_sealed(const struct ring *ring, enum api api, const uint8_t *sealed, size_t len,
                               uint8_t *out) {
    if (!sealed_shaped(sealed, len))
        return OPEN_MALFORMED;
    const struct kek *kek = ring_find(ring, sealed + 1);
    if (!kek)
        return OPEN_UNKNOWN_KEY;
    const uint8_t *nonce = sealed + HEADER_BYTES;
    uint8_t aad[HEADER_BYTES + 1];
    sealed_aad(sealed, api, aad);
    len -= SEALED_OVERHEAD;
    int rv = xaes_crypt(&ring->suite, false, kek, nonce, aad, sizeof aad, nonce + NONCE_BYTES, len, out);
    return rv < 0 ? OPEN_FORGED : OPENED;
}

/*
 * Tests the functions above before the first request, with known answers: both vectors of the
 * C2SP document, one key_id, and a forgery that must not open. Dies if a result is wrong.
 */
static void sealing_self_test(const struct suite *suite) {
    static const struct {
        uint8_t key;
        const char *aad, *sealed;
    } vectors[] = {
        {0x01, "", "\xce\x54\x6e\xf6\x3c\x9c\xc6\x07\x65\x92\x36\x09\xb3\x3a\x9a\x19"
                   "\x74\xe9\x6e\x52\xda\xf2\xfc\xf7\x07\x5e\x22\x71"},
        {0x03, "c2sp.org/XAES-256-GCM", "\x98\x6e\xc1\x83\x25\x93\xdf\x54\x43\xa1\x79\x43\x7f\xd0\x83\xbf"
                                        "\x3f\xdb\x41\xab\xd7\x40\xa2\x1f\x71\xeb\x76\x9d"},
    };
    static const uint8_t text[] = "XAES-256-GCM", nonce[] = "ABCDEFGHIJKLMNOPQRSTUVWX"; /* used without their NULs */
    for (size_t i = 0; i < sizeof vectors / sizeof *vectors; i++) {
        struct kek kek;
        uint8_t key[KEK_BYTES], data[sizeof text - 1 + TAG_BYTES], opened[sizeof text - 1];
        const uint8_t *aad = (const uint8_t *)vectors[i].aad;
        size_t aad_len = strlen(vectors[i].aad), len = sizeof text - 1;
        memset(key, vectors[i].key, sizeof key);
        kek_init(&kek, suite, key);
        xaes_crypt(suite, true, &kek, nonce, aad, aad_len, text, len, data);
        bool sealed = memcmp(data, vectors[i].sealed, sizeof data) == 0;
        data[0] ^= 1;
        bool forged = xaes_crypt(suite, false, &kek, nonce, aad, aad_len, data, len, opened) == 0;
        bool named = i > 0 || strcmp(kek.key_id, "fad1e91a654dbf1fdec047c069af5acd") == 0;
        if (!sealed || forged || !named)
            die("self-test failed: this machine's %s code computes wrong answers", suite->name);
    }
}

/* -------------------------------------------------------------------- Keys
 *
 * This section loads the KEKs into the ring, and refuses texts that are not keys.
 *
 * The environment variable KMS_KEK has one KEK in base64, or several with commas between. The
 * variable KMS_KEK_FILE names a file with the same text. The first KEK seals, and all open.
 *
 * Only a few places in memory ever hold a key. environment_take overwrites the value of
 * KMS_KEK in the environment itself. The text is parsed in locked pages, and then wiped. What
 * remains is the ring: the key schedule and the CMAC subkey of each KEK.
 *
 * A wrong key ends the program with a message that says what was probably pasted instead. The
 * message tells the kind and the length of the text, and never a part of it.
 *
 * Nothing here makes keys (genkey does), and no key is read again after the start.
 */

/*
 * Overwrites the values of all variables KMS_KEK in the environment. Unless `text` is NULL,
 * the first value is copied there first, with a NUL, and cut to cap bytes. Returns whether
 * there was such a variable.
 */
static bool environment_take(char *text, size_t cap) {
    static const char name[] = "KMS_KEK=";
    bool found = false;
    for (char **e = environ; e && *e; e++) {
        if (strncmp(*e, name, sizeof name - 1) != 0)
            continue;
        char *value = *e + sizeof name - 1;
        size_t len = strlen(value);
        if (text && !found) {
            if (len >= cap)
                len = cap - 1; /* ring_load refuses a text that fills the buffer */
            memcpy(text, value, len);
            text[len] = '\0';
        }
        wipe(value, strlen(value));
        found = true;
    }
    return found;
}

/*
 * Maps pages for an empty ring, with a fence: one page before and one page after them that no
 * access may touch. Dies if the kernel refuses. The kernel is also asked to lock the ring's
 * pages, so that they are never swapped out, and to keep them out of core files and of forked
 * children. The ring works even if it refuses these (RLIMIT_MEMLOCK may be 0, for example).
 */
static struct ring *ring_new(void) {
    size_t page = (size_t)getpagesize(), size = (sizeof(struct ring) + page - 1) / page * page;
    uint8_t *fence = mmap(NULL, page + size + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fence == MAP_FAILED || mprotect(fence + page, size, PROT_READ | PROT_WRITE) < 0)
        die("no memory for keys: %s", strerror(errno));
    struct ring *ring = (struct ring *)(void *)(fence + page);
    ring->unlocked = mlock(ring, size) < 0 ? errno : 0;
    ring->unforked = madvise(ring, size, MADV_DONTFORK) == 0;
    madvise(ring, size, MADV_DONTDUMP);
    ring->suite = suite_choose();
    return ring;
}

static void ring_free(struct ring *ring) {
    size_t page = (size_t)getpagesize(), size = (sizeof *ring + page - 1) / page * page;
    wipe(ring, sizeof *ring);
    munmap((uint8_t *)ring - page, page + size + page);
}

/* Says what is wrong with the bytes of a key. Returns NULL if they may be random bytes. */
static const char *kek_weakness(const uint8_t key[KEK_BYTES]) {
    unsigned differ = 0, printable = ~0u;
    for (size_t i = 0; i < KEK_BYTES; i++) {
        differ |= key[i] ^ key[0];
        printable &= in_range(key[i], ' ', '~');
    }
    return !differ     ? "consists of one byte repeated, which is no key"
           : printable ? "is 32 printable characters: a password, not a key"
                       : NULL;
}

static bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

/* Whether all characters are in an alphabet. `ranges` has the first and last of each range: "09" for the digits. */
static bool is_of(const char *text, size_t len, const char *ranges) {
    for (size_t i = 0; i < len; i++) {
        const char *r = ranges;
        while (*r && !in_range((uint8_t)text[i], (uint8_t)r[0], (uint8_t)r[1]))
            r += 2;
        if (!*r)
            return false;
    }
    return true;
}

static bool starts_with(const char *text, size_t len, const char *start) {
    size_t n = strlen(start);
    return len >= n && memcmp(text, start, n) == 0;
}

/*
 * Says what a text is that is not a key in base64. The sentence tells only the kind and the
 * length of the text, which are not secret. n is the result of base64_decode: the number of
 * bytes, or -1 for an invalid text. `decoded` has the bytes if n is at most KEY_JUDGED_BYTES.
 */
static const char *key_mistake(const char *text, size_t len, const uint8_t *decoded, long n) {
    enum { HEX_LEN = 2 * KEK_BYTES, BASE64_LEN = (KEK_BYTES + 2) / 3 * 4 };
    static const char standard[] = "AZaz09++//==", url_safe[] = "AZaz09--__==", hex[] = "09afAF", ascii[] = "\t\r ~";
    static const struct {
        const char *start, *what;
    } starts[] = {
        {"\xef\xbb\xbf", "begins with a byte order mark: save it without"},
        {"\xff\xfe", "is UTF-16, as PowerShell's > writes it: save it as ASCII"},
        {"\xfe\xff", "is UTF-16: save it as ASCII"},
        {"KMS_KEK", "begins with the name of a variable: leave that out"},
        {"export ", "is a command of a shell: the key alone is wanted"},
        {"-----BEGIN", "is PEM: 32 random bytes in base64 are wanted"},
        {"\"", "is in quotes: leave them out"},
        {"'", "is in quotes: leave them out"},
        {"#", "is a comment: a key file has none"},
    };
    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++)
        if (starts_with(text, len, starts[i].start))
            return starts[i].what;
    if (len == HEX_LEN && is_of(text, len, hex))
        return "is hexadecimal: base64 is wanted (xxd -r -p | base64)";
    if (n > BASE64_LEN + 1)
        return "does not decode to 32 bytes, but to more";
    if (n >= BASE64_LEN && is_of((const char *)decoded, BASE64_LEN, standard))
        return "is in base64 twice: decode it once (base64 -d)";
    if (n >= 0)
        return n < KEK_BYTES ? "does not decode to 32 bytes, but to fewer" : "does not decode to 32 bytes, but to more";
    if (!is_of(text, len, ascii))
        return memchr(text, '\0', len) ? "holds a NUL, so it is binary or UTF-16: base64 is wanted, as ASCII text"
                                       : "is not text: base64 is wanted (base64 <FILE)";
    if (!is_of(text, len, "!:<~")) /* the printable characters without space and semicolon */
        return "has white space or a semicolon in it: put commas between keys, and nothing into one";
    if (len == BASE64_LEN - 1 && is_of(text, len, standard))
        return "has 43 characters in place of 44: it lacks its padding, the = at the end, or another one";
    if (is_of(text, len, url_safe))
        return "is in URL-safe base64: standard base64 has + for - and / for _";
    return "is not standard base64 with padding";
}

/*
 * Decodes one key and adds it to the ring. White space around the key is skipped. Returns
 * NULL, or a constant sentence that says what is wrong with the key.
 */
static const char *ring_add(struct ring *ring, const char *text, size_t len) {
    while (len > 0 && is_space(text[0]))
        text++, len--;
    while (len > 0 && is_space(text[len - 1]))
        len--;
    if (len == 0)
        return "is empty";
    if (ring->count == KEK_MAX)
        return "is one too many: at most 16 keys are taken";
    uint8_t key[KEY_JUDGED_BYTES];
    const char *wrong = NULL;
    long n = base64_decode(text, len, key, sizeof key);
    if (n != KEK_BYTES) {
        wrong = key_mistake(text, len, key, n);
    } else if (!(wrong = kek_weakness(key))) {
        struct kek *kek = &ring->keks[ring->count];
        kek_init(kek, &ring->suite, key);
        if (ring_find(ring, kek->fingerprint))
            wrong = "is there twice";
        else
            ring->count++;
    }
    wipe(key, sizeof key);
    return wrong;
}

/*
 * Adds all keys of a text, which commas separate. If a key is wrong, dies with a message that
 * names `source` and the place of the key, counted from 1.
 */
static void ring_parse(struct ring *ring, const char *source, const char *text, size_t len) {
    unsigned place = 1;
    for (const char *end = text + len;; place++) {
        const char *comma = memchr(text, ',', (size_t)(end - text));
        const char *wrong = ring_add(ring, text, (size_t)((comma ? comma : end) - text));
        if (wrong)
            die("%s: key %u %s", source, place, wrong);
        if (!comma)
            return;
        text = comma + 1;
    }
}

/*
 * Reads a key file into `text`. Returns its length, which is less than cap. Dies if the file
 * is not a regular file, belongs to a user other than root and our own, gives other users any
 * permission, lets its group write, or is too long. The checks look at the open
 * descriptor, so nobody can exchange the file between the checks and the reading.
 */
static size_t key_file_read(const char *path, char *text, size_t cap) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    struct stat st;
    if (fd < 0)
        die("KMS_KEK_FILE %s: open: %s", path, strerror(errno));
    if (fstat(fd, &st) < 0)
        die("KMS_KEK_FILE %s: stat: %s", path, strerror(errno));
    if (!S_ISREG(st.st_mode))
        die("KMS_KEK_FILE %s: not a regular file", path);
    if (st.st_uid != 0 && st.st_uid != geteuid())
        die("KMS_KEK_FILE %s: belongs to uid %u: it has to be root's, or that of our own uid %u", path, st.st_uid,
            geteuid());
    if (st.st_mode & (S_IRWXO | S_IWGRP))
        die("KMS_KEK_FILE %s: mode %c%c%c%c lets others read it or its group write it", path, '0',
            '0' + (int)(st.st_mode >> 6 & 7), '0' + (int)(st.st_mode >> 3 & 7), '0' + (int)(st.st_mode & 7));
    size_t len = 0;
    ssize_t n;
    while ((n = read(fd, text + len, cap - len)) != 0) {
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            die("KMS_KEK_FILE %s: read: %s", path, strerror(errno));
        if ((len += (size_t)n) == cap)
            die("KMS_KEK_FILE %s: larger than %d bytes", path, KEK_TEXT_MAX);
    }
    close(fd);
    return len;
}

/*
 * Loads the configured KEKs. Returns a ring that can seal and open. Dies if neither or both of
 * KMS_KEK and KMS_KEK_FILE are set, or if the file or a key is wrong.
 */
static struct ring *ring_load(void) {
    struct ring *ring = ring_new();
    const char *path = getenv("KMS_KEK_FILE");
    char source[LOG_LINE_MAX / 2] = "KMS_KEK";
    bool variable = environment_take(ring->text, sizeof ring->text);
    if (variable && path)
        die("both KMS_KEK and KMS_KEK_FILE are set: keep one");
    if (!variable && !path)
        die("no key: set KMS_KEK_FILE to a file, or KMS_KEK to the key (kmsplugin genkey makes one)");
    size_t len = strlen(ring->text);
    if (len == KEK_TEXT_MAX)
        die("KMS_KEK: %d bytes or more", KEK_TEXT_MAX);
    if (path) {
        struct text t = {.buf = source, .cap = sizeof source - 1};
        text_add(&t, "KMS_KEK_FILE %s", path);
        source[t.len] = '\0';
        len = key_file_read(path, ring->text, sizeof ring->text);
    }
    ring_parse(ring, source, ring->text, len);
    wipe(ring->text, sizeof ring->text);
    stack_wipe();
    return ring;
}

/* ------------------------------------------------------------- KMS service
 *
 * The six RPCs of the two KMS APIs of Kubernetes: v2 (k8s.io/kms/apis/v2) and the older v1
 * (v1beta1). Each RPC takes a request that protobuf-c has unpacked, and fills in an answer: a
 * response packed into the arena, or a gRPC status with a fixed sentence.
 *
 * Encrypt seals a DEK and Decrypt opens it. Status (v2) says whether the plugin works;
 * Version (v1) names the plugin. Status and a v2 Encrypt also return a key_id. The API server
 * expects the same key_id from both, so both name the first KEK of the ring, which never
 * changes while the process lives. The plugin does not know whether a plaintext is a key: it
 * seals any bytes up to the limits.
 *
 * Nothing here reads or writes a socket, so unit tests and fuzzers call kms_call with bytes.
 */

/* Makes the answer an error. `message` must outlive the answer. */
static void answer_error(struct answer *a, enum grpc_code code, const char *message) {
    a->code = code;
    a->message = message;
}

static void answer_no_memory(struct answer *a) {
    answer_error(a, GRPC_RESOURCE_EXHAUSTED, "the message has too many fields");
}

/*
 * Packs a response into the arena. It always fits into MESSAGE_MAX: the plaintext of a
 * Decrypt is shorter than its request, and kms_seal limits the ciphertext of an Encrypt.
 */
static void answer_message(struct kms *kms, struct answer *a, const void *message) {
    uint8_t *bytes = arena_new(&kms->arena, MESSAGE_MAX);
    if (!bytes) {
        answer_no_memory(a);
        return;
    }
    a->bytes = bytes;
    a->len = protobuf_c_message_pack(message, bytes);
    arena_trim(&kms->arena, bytes + a->len);
}

/*
 * Seals a plaintext into the arena, if the sealed form has at most ciphertext_max bytes.
 * Returns true and sets `out`, or returns false and makes the answer an error.
 */
static bool kms_seal(struct kms *kms, struct answer *a, enum api api, ProtobufCBinaryData plaintext,
                     size_t ciphertext_max, ProtobufCBinaryData *out) {
    if (plaintext.len + SEALED_OVERHEAD > ciphertext_max) {
        answer_error(a, GRPC_INVALID_ARGUMENT,
                     api == API_V2 ? "plaintext over 967 bytes: its ciphertext would pass the 1024 bytes of KMS v2"
                                   : "plaintext too long: no Decrypt request could carry its ciphertext");
        return false;
    }
    out->len = plaintext.len + SEALED_OVERHEAD;
    out->data = arena_new(&kms->arena, out->len);
    if (!out->data) {
        answer_no_memory(a);
        return false;
    }
    a->kek = &kms->ring->keks[0];
    if (seal(kms->ring, &kms->random, api, plaintext.data, plaintext.len, out->data) < 0) {
        answer_error(a, GRPC_INTERNAL, "the kernel gives no random bytes");
        return false;
    }
    return true;
}

/*
 * Opens a sealed form into the arena. The caller has checked it with kms_shaped or made it
 * with kms_seal, so it is not too short. Returns true and sets `out`, or returns false and
 * makes the answer an error.
 */
static bool kms_open(struct kms *kms, struct answer *a, enum api api, ProtobufCBinaryData sealed,
                     ProtobufCBinaryData *out) {
    static const char missing[] = "no KEK is configured with key_id ";
    out->len = sealed.len - SEALED_OVERHEAD;
    out->data = arena_new(&kms->arena, out->len);
    char *message = arena_new(&kms->arena, sizeof missing + KEY_ID_LEN);
    if (!out->data || !message) {
        answer_no_memory(a);
        return false;
    }
    switch (open_sealed(kms->ring, api, sealed.data, sealed.len, out->data)) {
    case OPENED:
        a->kek = ring_find(kms->ring, sealed.data + 1);
        a->key_id = a->kek->key_id;
        return true;
    case OPEN_UNKNOWN_KEY:
        memcpy(message, missing, sizeof missing);
        hex_encode(sealed.data + 1, FINGERPRINT_BYTES, message + sizeof missing - 1);
        answer_error(a, GRPC_NOT_FOUND, message);
        return false;
    case OPEN_MALFORMED:
    case OPEN_FORGED:
        break;
    }
    answer_error(a, GRPC_INVALID_ARGUMENT, "the ciphertext is damaged, or was sealed for the other API");
    return false;
}

/*
 * Checks the length and the format byte of a ciphertext, before Decrypt reads the rest of it.
 * Returns false and makes the answer an error if they are wrong.
 */
static bool kms_shaped(struct answer *a, ProtobufCBinaryData sealed, size_t max) {
    if (sealed_shaped(sealed.data, sealed.len) && sealed.len <= max)
        return true;
    answer_error(a, GRPC_INVALID_ARGUMENT, "the ciphertext is none of this plugin's: wrong length or format byte");
    return false;
}

/* v2 Status. Seals 32 zero bytes and opens the result, so that "ok" means a working service. */
static void v2_status(struct kms *kms, const void *request, struct answer *a) {
    (void)request;
    uint8_t probe[KEK_BYTES] = {0};
    ProtobufCBinaryData plain = {sizeof probe, probe}, sealed, opened;
    a->key_id = kms->ring->keks[0].key_id;
    if (!kms_seal(kms, a, API_V2, plain, V2_CIPHERTEXT_MAX, &sealed))
        return;
    if (!kms_open(kms, a, API_V2, sealed, &opened) || memcmp(opened.data, probe, sizeof probe) != 0) {
        answer_error(a, GRPC_INTERNAL, "what was sealed does not open to the same bytes");
        return;
    }
    V2__StatusResponse response = V2__STATUS_RESPONSE__INIT;
    response.version = (char *)"v2";
    response.healthz = (char *)"ok";
    response.key_id = kms->ring->keks[0].key_id;
    answer_message(kms, a, &response);
}

/* v2 Encrypt. The request's uid identifies the request in the log. */
static void v2_encrypt(struct kms *kms, const void *message, struct answer *a) {
    const V2__EncryptRequest *request = message;
    V2__EncryptResponse response = V2__ENCRYPT_RESPONSE__INIT;
    a->uid = request->uid;
    a->key_id = response.key_id = kms->ring->keks[0].key_id;
    if (kms_seal(kms, a, API_V2, request->plaintext, V2_CIPHERTEXT_MAX, &response.ciphertext))
        answer_message(kms, a, &response);
}

/*
 * v2 Decrypt. The key_id of the request must be the one in the ciphertext. Annotations are
 * extra data of a plugin; this plugin returns none with Encrypt, so none are accepted.
 */
static void v2_decrypt(struct kms *kms, const void *message, struct answer *a) {
    const V2__DecryptRequest *request = message;
    V2__DecryptResponse response = V2__DECRYPT_RESPONSE__INIT;
    char sealing_id[KEY_ID_LEN + 1];
    a->uid = request->uid;
    a->key_id = request->key_id;
    if (!kms_shaped(a, request->ciphertext, V2_CIPHERTEXT_MAX))
        return;
    hex_encode(request->ciphertext.data + 1, FINGERPRINT_BYTES, sealing_id);
    if (strcmp(request->key_id, sealing_id) != 0)
        answer_error(a, GRPC_INVALID_ARGUMENT, "key_id is not the one that the ciphertext was sealed under");
    else if (request->n_annotations > 0)
        answer_error(a, GRPC_INVALID_ARGUMENT, "this plugin issues no annotations, and takes none");
    else if (kms_open(kms, a, API_V2, request->ciphertext, &response.plaintext))
        answer_message(kms, a, &response);
}

/*
 * Every v1 request carries the version of the API. Returns false and makes the answer an
 * error if the version is wrong.
 */
static bool v1_version_right(struct answer *a, const char *version) {
    if (strcmp(version, "v1beta1") == 0)
        return true;
    answer_error(a, GRPC_INVALID_ARGUMENT, "the request's version is not v1beta1");
    return false;
}

static void v1_version(struct kms *kms, const void *message, struct answer *a) {
    const V2__V1beta1__VersionRequest *request = message;
    V2__V1beta1__VersionResponse response = V2__V1BETA1__VERSION_RESPONSE__INIT;
    response.version = (char *)"v1beta1";
    response.runtime_name = (char *)"kmsplugin";
    response.runtime_version = (char *)VERSION;
    if (v1_version_right(a, request->version))
        answer_message(kms, a, &response);
}

/* v1 Encrypt. The response has no key_id. */
static void v1_encrypt(struct kms *kms, const void *message, struct answer *a) {
    const V2__V1beta1__EncryptRequest *request = message;
    V2__V1beta1__EncryptResponse response = V2__V1BETA1__ENCRYPT_RESPONSE__INIT;
    a->key_id = kms->ring->keks[0].key_id;
    if (v1_version_right(a, request->version) &&
        kms_seal(kms, a, API_V1, request->plain, V1_CIPHERTEXT_MAX, &response.cipher))
        answer_message(kms, a, &response);
}

static void v1_decrypt(struct kms *kms, const void *message, struct answer *a) {
    const V2__V1beta1__DecryptRequest *request = message;
    V2__V1beta1__DecryptResponse response = V2__V1BETA1__DECRYPT_RESPONSE__INIT;
    if (v1_version_right(a, request->version) && kms_shaped(a, request->cipher, V1_CIPHERTEXT_MAX) &&
        kms_open(kms, a, API_V1, request->cipher, &response.plain))
        answer_message(kms, a, &response);
}

/*
 * The RPCs: the path of the HTTP request, the names of service and method for log lines and
 * metrics, the type of the request, and the function.
 */
#define RPC(service, method, type, call)                                                                     \
    {"/" service ".KeyManagementService/" method, sizeof "/" service ".KeyManagementService/" method - 1, \
     service, method, &v2__##type##__descriptor, call}
static const struct {
    const char *path;
    size_t path_len;
    const char *service, *method;
    const ProtobufCMessageDescriptor *request;
    void (*call)(struct kms *, const void *, struct answer *);
} rpcs[RPCS] = {
    [V2_STATUS] = RPC("v2", "Status", status_request, v2_status),
    [V2_ENCRYPT] = RPC("v2", "Encrypt", encrypt_request, v2_encrypt),
    [V2_DECRYPT] = RPC("v2", "Decrypt", decrypt_request, v2_decrypt),
    [V1_VERSION] = RPC("v1beta1", "Version", v1beta1__version_request, v1_version),
    [V1_ENCRYPT] = RPC("v1beta1", "Encrypt", v1beta1__encrypt_request, v1_encrypt),
    [V1_DECRYPT] = RPC("v1beta1", "Decrypt", v1beta1__decrypt_request, v1_decrypt),
    [RPC_UNKNOWN] = {"", 0, "unknown", "unknown", NULL, NULL},
};

/* Whether an RPC seals or opens bytes of the client. (Status seals bytes of its own.) */
static bool rpc_uses_kek(enum rpc rpc) {
    return rpc == V2_ENCRYPT || rpc == V2_DECRYPT || rpc == V1_ENCRYPT || rpc == V1_DECRYPT;
}

/* Sets up a service with a ring. Returns 0, or -1 without memory. */
static int kms_init(struct kms *kms, struct ring *ring) {
    kms->ring = ring;
    kms->random.left = kms->random.next = 0;
    kms->allocator = (ProtobufCAllocator){.alloc = arena_new, .free = arena_free, .allocator_data = &kms->arena};
    return arena_init(&kms->arena);
}

/*
 * Handles one RPC, which is not RPC_UNKNOWN. `bytes` is the encoded request. The answer is
 * valid until kms_done, which the caller must call.
 */
static void kms_call(struct kms *kms, enum rpc rpc, const uint8_t *bytes, size_t len, struct answer *a) {
    *a = (struct answer){.code = GRPC_OK, .uid = "", .key_id = ""};
    int strings = strings_check(rpcs[rpc].request, bytes, len);
    void *request = strings < 0 ? NULL : protobuf_c_message_unpack(rpcs[rpc].request, &kms->allocator, len, bytes);
    if (!request && kms->arena.exhausted)
        answer_no_memory(a);
    else if (!request)
        answer_error(a, GRPC_INTERNAL, "the request is not a valid protobuf message");
    else if (strings > 0)
        answer_error(a, GRPC_INVALID_ARGUMENT, "a string in the request holds a NUL");
    else
        rpcs[rpc].call(kms, request, a);
}

/* Wipes the request, the answer and everything else in the arena. */
static void kms_done(struct kms *kms) {
    arena_reset(&kms->arena);
}

/* ----------------------------------------------------------------- Metrics
 *
 * Counters of requests, durations, connections and uses of KEKs, and their text in
 * Prometheus' format 0.0.4. Prometheus is a monitoring system that fetches the page GET
 * /metrics on the same socket.
 *
 * A metric has a name and labels, and each combination of label values is a series of its
 * own. A histogram counts durations in buckets. On the page, the bucket with the label le="1"
 * counts all durations up to 1 second.
 *
 * Nothing here sends the page: stream_metrics does.
 */

/* The name of a status code, as in the gRPC document. */
static const char *grpc_code_name(unsigned code) {
    static const char *const names[GRPC_CODES] = {
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
        "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
        "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"};
    return code < GRPC_CODES ? names[code] : "out of range";
}

/* Upper bounds of the buckets, in microseconds. */
static const uint64_t bucket_bounds_us[] = {
#define BUCKET_US(us, s) us,
    BUCKETS(BUCKET_US)
};

/* The same bounds as text, in seconds. */
static const char *const bucket_bounds_s[] = {
#define BUCKET_S(us, s) s,
    BUCKETS(BUCKET_S)
};

/* Sets the start time, and opens statm while files can still be opened. */
static void metrics_init(struct metrics *m) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    m->start_time_s = (uint64_t)now.tv_sec;
    m->statm = open("/proc/self/statm", O_RDONLY | O_CLOEXEC);
}

/* Counts one answered request that took `us` microseconds. */
static void metrics_count(struct metrics *m, enum rpc rpc, enum grpc_code code, uint64_t us) {
    size_t bucket = 0;
    while (bucket < BUCKETS_LEN && us > bucket_bounds_us[bucket])
        bucket++;
    m->requests[rpc][code]++;
    m->buckets[rpc][bucket]++;
    m->microseconds[rpc] += us;
}

/* The resident memory of the process in bytes, from the second number of /proc/self/statm; 0 if unknown. */
static uint64_t metrics_resident(const struct metrics *m) {
    char buf[64];
    ssize_t n = m->statm < 0 ? -1 : pread(m->statm, buf, sizeof buf - 1, 0);
    if (n <= 0)
        return 0;
    buf[n] = '\0';
    const char *second = strchr(buf, ' ');
    return second ? number_next(&second) * (uint64_t)getpagesize() : 0;
}

/* Adds the histogram of one RPC. On the page each bucket includes all lower ones. */
static void metrics_histogram(const struct metrics *m, unsigned rpc, struct text *t) {
    uint64_t total = 0;
    const char *service = rpcs[rpc].service, *method = rpcs[rpc].method;
    for (size_t i = 0; i <= BUCKETS_LEN; i++) {
        total += m->buckets[rpc][i];
        text_add(t, "kmsplugin_grpc_request_duration_seconds_bucket{service=\"%s\",method=\"%s\",le=\"%s\"} %llu\n",
                 service, method, i < BUCKETS_LEN ? bucket_bounds_s[i] : "+Inf", (unsigned long long)total);
    }
    text_add(t, "kmsplugin_grpc_request_duration_seconds_sum{service=\"%s\",method=\"%s\"} %llu.%06llu\n", service,
             method, (unsigned long long)(m->microseconds[rpc] / 1000000),
             (unsigned long long)(m->microseconds[rpc] % 1000000));
    text_add(t, "kmsplugin_grpc_request_duration_seconds_count{service=\"%s\",method=\"%s\"} %llu\n", service, method,
             (unsigned long long)total);
}

/* Adds the two lines that come before the series of a metric. */
static void metrics_metric(struct text *t, const char *name, const char *type, const char *help) {
    text_add(t, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/*
 * Adds a counter of uses of KEKs by uid and method. The first USER_SERIES_MAX users have a
 * series each, and all others share one.
 */
static void metrics_uses(struct text *t, const char *name, const struct user *users, size_t count, bool failures) {
    for (unsigned rpc = 0; rpc < RPCS; rpc++) {
        uint64_t other = 0;
        for (size_t i = 0; i < count; i++) {
            uint64_t n = failures ? users[i].failures[rpc] : users[i].uses[rpc];
            if (i >= USER_SERIES_MAX)
                other += n;
            else if (n > 0)
                text_add(t, "%s{uid=\"%u\",service=\"%s\",method=\"%s\"} %llu\n", name, users[i].uid,
                         rpcs[rpc].service, rpcs[rpc].method, (unsigned long long)n);
        }
        if (other > 0)
            text_add(t, "%s{uid=\"other\",service=\"%s\",method=\"%s\"} %llu\n", name, rpcs[rpc].service,
                     rpcs[rpc].method, (unsigned long long)other);
    }
}

/* Adds the whole page. `users` are those who may connect. */
static void metrics_write(const struct metrics *m, const char *key_id, size_t connections, const struct user *users,
                          size_t user_count, struct text *t) {
    metrics_metric(t, "kmsplugin_grpc_requests_total", "counter", "gRPC requests answered.");
    for (unsigned rpc = 0; rpc < RPCS; rpc++)
        for (unsigned code = 0; code < GRPC_CODES; code++)
            if (m->requests[rpc][code] > 0 || (code == GRPC_OK && rpc != RPC_UNKNOWN))
                text_add(t, "kmsplugin_grpc_requests_total{service=\"%s\",method=\"%s\",code=\"%s\"} %llu\n",
                         rpcs[rpc].service, rpcs[rpc].method, grpc_code_name(code),
                         (unsigned long long)m->requests[rpc][code]);
    metrics_metric(t, "kmsplugin_grpc_request_duration_seconds", "histogram", "From a request's head to its answer.");
    for (unsigned rpc = 0; rpc < RPC_UNKNOWN; rpc++)
        metrics_histogram(m, rpc, t);
    metrics_metric(t, "kmsplugin_kek_uses_total", "counter", "Encrypt and Decrypt requests by the peer's uid.");
    metrics_uses(t, "kmsplugin_kek_uses_total", users, user_count, false);
    metrics_metric(t, "kmsplugin_kek_use_failures_total", "counter", "Those that were answered with an error.");
    metrics_uses(t, "kmsplugin_kek_use_failures_total", users, user_count, true);
    metrics_metric(t, "kmsplugin_connections", "gauge", "Open connections.");
    text_add(t, "kmsplugin_connections %zu\n", connections);
    metrics_metric(t, "kmsplugin_connections_total", "counter", "Connections accepted.");
    text_add(t, "kmsplugin_connections_total %llu\n", (unsigned long long)m->accepted);
    metrics_metric(t, "kmsplugin_refused_peers_total", "counter", "Connections closed for the peer's uid.");
    text_add(t, "kmsplugin_refused_peers_total %llu\n", (unsigned long long)m->refused);
    metrics_metric(t, "kmsplugin_key_info", "gauge", "The key_id of the KEK that seals.");
    text_add(t, "kmsplugin_key_info{key_id=\"%s\"} 1\n", key_id);
    metrics_metric(t, "kmsplugin_build_info", "gauge", "The version that runs.");
    text_add(t, "kmsplugin_build_info{version=\"" VERSION "\"} 1\n");
    metrics_metric(t, "process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.");
    text_add(t, "process_start_time_seconds %llu\n", (unsigned long long)m->start_time_s);
    metrics_metric(t, "process_resident_memory_bytes", "gauge", "Resident memory size in bytes.");
    text_add(t, "process_resident_memory_bytes %llu\n", (unsigned long long)metrics_resident(m));
}

/* -------------------------------------------------------------------- gRPC
 *
 * gRPC over HTTP/2 (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md): the formats that gRPC adds
 * to HTTP/2. An RPC is one HTTP/2 request, a POST to /SERVICE/METHOD. The request has a head
 * (frames HEADERS, see section HTTP/2) and a body (frames DATA). The body is a prefix of 5
 * bytes and a message:
 *
 *     offset  bytes  content
 *     0       1      compressed flag; always 0 here, as this server offers no compression
 *     1       4      length of the message, big-endian
 *     5       n      message
 *
 * A response has HEADERS (:status 200, content-type), DATA of the same form, and trailers.
 * Trailers are a second HEADERS that ends the stream, with grpc-status and grpc-message. An
 * error response may have a single HEADERS with all these fields ("trailers-only").
 *
 * Only values are encoded and decoded here. Section HTTP/2 puts them into a stream.
 */

/* Writes the prefix of an uncompressed message of len bytes. */
static void grpc_prefix_write(uint8_t prefix[GRPC_PREFIX_BYTES], size_t len) {
    prefix[0] = 0;
    for (int i = 1; i < GRPC_PREFIX_BYTES; i++)
        prefix[i] = (uint8_t)(len >> 8 * (GRPC_PREFIX_BYTES - 1 - i));
}

/* The length of the message that follows a prefix. */
static size_t grpc_prefix_len(const uint8_t prefix[GRPC_PREFIX_BYTES]) {
    return (size_t)prefix[1] << 24 | (size_t)prefix[2] << 16 | (size_t)prefix[3] << 8 | prefix[4];
}

/*
 * Reads grpc-timeout: 1 to 8 digits and one of the units H M S m u n (hours, minutes,
 * seconds, milliseconds, microseconds, nanoseconds). Returns microseconds, rounded up, or
 * UINT64_MAX if the value has another form.
 */
static uint64_t grpc_timeout_us(const uint8_t *value, size_t len) {
    uint64_t n = 0;
    if (len < 2 || len > 9)
        return UINT64_MAX;
    for (size_t i = 0; i + 1 < len; i++) {
        if (value[i] < '0' || value[i] > '9')
            return UINT64_MAX;
        n = 10 * n + (uint64_t)(value[i] - '0');
    }
    switch (value[len - 1]) {
    case 'H': return n * 3600 * 1000000;
    case 'M': return n * 60 * 1000000;
    case 'S': return n * 1000000;
    case 'm': return n * 1000;
    case 'u': return n;
    case 'n': return (n + 999) / 1000;
    }
    return UINT64_MAX;
}

/*
 * Encodes grpc-message: '%' and all bytes except printable ASCII become %XX. Returns the
 * length of the result, which is cut at `cap` and never within a %XX.
 */
static size_t percent_encode(const char *s, char *out, size_t cap) {
    size_t n = 0;
    for (; *s; s++) {
        uint8_t c = (uint8_t)*s;
        bool plain = c >= ' ' && c <= '~' && c != '%';
        if (n + (plain ? 1 : 3) > cap)
            break;
        if (plain) {
            out[n++] = (char)c;
        } else {
            out[n++] = '%';
            out[n++] = "0123456789ABCDEF"[c >> 4];
            out[n++] = "0123456789ABCDEF"[c & 15];
        }
    }
    return n;
}

/* ----------------------------------------------------------- HTTP requests
 *
 * The rules that the head of a request must follow (RFC 9113 sections 8.2 and 8.3). nghttp2
 * could check them, but it would reset some requests of real clients. On a UNIX socket
 * clients send :authority as "localhost", as the path of the socket (percent-encoded or not),
 * as "@name", as an empty string, or not at all.
 *
 * There are three kinds of wrong requests. If a request is malformed, its stream is reset
 * with PROTOCOL_ERROR. A well-formed request that does not use gRPC gets an HTTP status. A
 * gRPC request for an unknown method gets a gRPC status.
 *
 * The functions here only judge. stream_head_end in section HTTP/2 acts.
 */

/* Whether the bytes equal a string constant. */
#define IS(bytes, len, s) ((len) == sizeof(s) - 1 && memcmp((bytes), (s), sizeof(s) - 1) == 0)

/* The number of a header field's name; FIELD_OTHER for names without a meaning here. */
static enum field_name field_name(const uint8_t *name, size_t len) {
    switch (len) {
    case 2: return IS(name, len, "te") ? FIELD_TE : FIELD_OTHER;
    case 5: return IS(name, len, ":path") ? FIELD_PATH : FIELD_OTHER;
    case 7:
        return IS(name, len, ":method")   ? FIELD_METHOD
               : IS(name, len, ":scheme") ? FIELD_SCHEME
               : IS(name, len, "upgrade") ? FIELD_FORBIDDEN
                                          : FIELD_OTHER;
    case 10:
        return IS(name, len, ":authority")                                  ? FIELD_AUTHORITY
               : IS(name, len, "connection") || IS(name, len, "keep-alive") ? FIELD_FORBIDDEN
                                                                            : FIELD_OTHER;
    case 12:
        return IS(name, len, "content-type")   ? FIELD_CONTENT_TYPE
               : IS(name, len, "grpc-timeout") ? FIELD_TIMEOUT
                                               : FIELD_OTHER;
    case 14: return IS(name, len, "content-length") ? FIELD_CONTENT_LENGTH : FIELD_OTHER;
    case 16: return IS(name, len, "proxy-connection") ? FIELD_FORBIDDEN : FIELD_OTHER;
    case 17: return IS(name, len, "transfer-encoding") ? FIELD_FORBIDDEN : FIELD_OTHER;
    }
    return FIELD_OTHER;
}

/* Whether a content-type is application/grpc or application/grpc+proto, with or without parameters. */
static bool is_grpc(const uint8_t *value, size_t len) {
    static const char type[] = "application/grpc+proto";
    enum { BARE_LEN = sizeof "application/grpc" - 1 };
    const uint8_t *end = memchr(value, ';', len);
    if (end)
        len = (size_t)(end - value);
    return (len == BARE_LEN || len == sizeof type - 1) && strncasecmp((const char *)value, type, len) == 0;
}

/* Reads content-length. Returns false if it is not a decimal number of at most 18 digits. */
static bool request_content_length(struct request *r, const uint8_t *value, size_t len) {
    enum { DIGITS_MAX = 18 };
    r->content_length = 0;
    for (size_t i = 0; i < len; i++) {
        if (value[i] < '0' || value[i] > '9')
            return false;
        r->content_length = 10 * r->content_length + (uint64_t)(value[i] - '0');
    }
    return len > 0 && len <= DIGITS_MAX;
}

/* Finds the RPC that a path names, RPC_UNKNOWN if it names none. Recognizes /metrics. */
static void request_path(struct request *r, const uint8_t *value, size_t len) {
    r->metrics = IS(value, len, "/metrics");
    r->rpc = 0;
    while (r->rpc < RPC_UNKNOWN && (len != rpcs[r->rpc].path_len || memcmp(value, rpcs[r->rpc].path, len) != 0))
        r->rpc++;
}

/*
 * Whether a field's value has no control characters except tabs, and no white space at its
 * ends (RFC 9113 8.2.1).
 */
static bool is_value(const uint8_t *value, size_t len) {
    return nghttp2_check_header_value_rfc9113(value, len) != 0;
}

/*
 * Takes a field of the head that has a meaning here. Returns false if it is malformed. A
 * value that equals a constant below is well-formed, so is_value checks only the other
 * values; this saves 4 % of the instructions of a request.
 */
static bool request_known(struct request *r, enum field_name name, const uint8_t *value, size_t len) {
    bool again = r->seen & 1u << name;
    r->seen |= 1u << name;
    switch (name) {
    case FIELD_METHOD:
        r->method = IS(value, len, "POST")      ? METHOD_POST
                    : IS(value, len, "GET")     ? METHOD_GET
                    : IS(value, len, "CONNECT") ? METHOD_CONNECT
                                                : METHOD_OTHER;
        return !again && len > 0 && (r->method != METHOD_OTHER || is_value(value, len));
    case FIELD_SCHEME:
        return !again && len > 0 && (IS(value, len, "http") || is_value(value, len));
    case FIELD_PATH:
        request_path(r, value, len);
        if (r->rpc == RPC_UNKNOWN && (len == 0 || (value[0] != '/' && !IS(value, len, "*")) || !is_value(value, len)))
            return false;
        return !again;
    case FIELD_AUTHORITY: /* any well-formed value */
        return !again && (IS(value, len, "localhost") || is_value(value, len));
    case FIELD_CONTENT_TYPE:
        r->grpc = IS(value, len, "application/grpc");
        if (!r->grpc && !is_value(value, len))
            return false;
        r->grpc = r->grpc || is_grpc(value, len);
        return !again;
    case FIELD_CONTENT_LENGTH:
        return !again && request_content_length(r, value, len);
    case FIELD_TIMEOUT: /* a wrong timeout is an error of gRPC, not of HTTP */
        r->timeout_us = grpc_timeout_us(value, len);
        r->bad_timeout |= again || r->timeout_us == UINT64_MAX;
        return r->timeout_us != UINT64_MAX || is_value(value, len);
    case FIELD_TE: /* a list, which may come in several fields */
        return IS(value, len, "trailers") || (len == 8 && strncasecmp((const char *)value, "trailers", 8) == 0);
    default: /* FIELD_FORBIDDEN */
        return false;
    }
}

static void request_init(struct request *r) {
    *r = (struct request){.rpc = RPC_UNKNOWN, .timeout_us = UINT64_MAX, .content_length = UINT64_MAX};
}

/*
 * Judges one field of the head or of the trailers. A pseudo-header field must have a meaning
 * here, must come before all other fields, and must not be in trailers.
 */
static void request_field(struct request *r, const uint8_t *name, size_t name_len, const uint8_t *value, size_t len) {
    r->field_bytes += name_len + len + FIELD_OVERHEAD_BYTES;
    if (r->malformed || r->field_bytes > FIELDS_MAX_BYTES)
        return; /* the request is rejected already */
    enum field_name known = field_name(name, name_len);
    bool pseudo = name_len > 0 && name[0] == ':', sound;
    if (known == FIELD_FORBIDDEN || (known != FIELD_OTHER && !r->trailers))
        sound = request_known(r, known, value, len);
    else
        sound = nghttp2_check_header_name(name, name_len) && is_value(value, len);
    if (pseudo)
        sound = sound && known != FIELD_OTHER && !r->trailers && !(r->seen & SEEN_REGULAR);
    else
        r->seen |= SEEN_REGULAR;
    r->malformed = !sound;
}

/*
 * Judges the head as a whole (RFC 9113 8.3.1 and 8.5). CONNECT needs :method and :authority,
 * without :scheme and :path. Any other request needs :method, :scheme and :path. A head over
 * FIELDS_MAX_BYTES is not judged here: it is rejected for its size.
 */
static void request_head_end(struct request *r) {
    const unsigned method = 1u << FIELD_METHOD, scheme = 1u << FIELD_SCHEME, path = 1u << FIELD_PATH,
                   authority = 1u << FIELD_AUTHORITY;
    bool whole = r->method == METHOD_CONNECT ? (r->seen & (method | authority | scheme | path)) == (method | authority)
                                             : (r->seen & (method | scheme | path)) == (method | scheme | path);
    if (r->field_bytes <= FIELDS_MAX_BYTES)
        r->malformed |= !whole;
    r->trailers = true;
}

/* ------------------------------------------------------------------- Room
 *
 * Limits on the memory, streams, connections and log lines that peers cause. Everything that
 * is kept for a peer is counted three times: for its connection, for its uid, and for the
 * server.
 *
 * When the server reaches a limit, it closes a connection of the uid that holds most. If the
 * uid that asks for more would hold most, it loses a connection of its own. Therefore a uid
 * that holds less than its even share of a limit loses nothing to a uid that holds more. It
 * makes no difference how many connections a uid has.
 *
 * This section does not share out CPU time. The event loop does, by limiting reads.
 */

/* Makes sure that the loop wakes up at this time (in milliseconds) or earlier. */
static void server_due(struct server *s, int64_t ms) {
    if (ms < s->next_ms)
        s->next_ms = ms;
}

/* Logs how many lines were left out, if their minute is over or `end` is set. */
static void server_log_left_out(struct server *s, bool end) {
    if (s->lines_left_out == 0)
        return;
    if (!end && s->now_ms < s->minute_ms + MINUTE_MS) {
        server_due(s, s->minute_ms + MINUTE_MS);
        return;
    }
    log_line(LOG_WARN, "msg=\"lines left out\" count=%llu", (unsigned long long)s->lines_left_out);
    s->lines_left_out = 0;
}

/*
 * Decides whether one more line may be logged. It is called for lines that a peer can
 * cause as often as it likes. LINES_A_MINUTE of them are permitted, so that peers cannot fill a disk. Each
 * uid has an even share, so that no uid can hide another's lines. Further lines are counted.
 */
static bool server_may_log(struct server *s, struct user *user) {
    if (s->now_ms >= s->minute_ms + MINUTE_MS) {
        server_log_left_out(s, true);
        s->minute_ms = s->now_ms;
        for (size_t i = 0; i < s->user_count; i++)
            s->users[i].minute_lines = 0;
    }
    if ((user->minute_lines + 1) * s->user_count > LINES_A_MINUTE) {
        s->lines_left_out++;
        server_log_left_out(s, false);
        return false;
    }
    user->minute_lines++;
    return true;
}

/* Counts n units of a resource for a connection. A negative n gives units back. */
static void conn_count(struct conn *c, enum resource r, ptrdiff_t n) {
    c->used[r] += (size_t)n;
    c->user->used[r] += (size_t)n;
    c->server->used[r] += (size_t)n;
}

/* Frees counted memory of a connection. */
static void conn_free_bytes(struct conn *c, void *bytes) {
    conn_count(c, HELD, -(ptrdiff_t)block_cost(bytes));
    heap_free(&c->server->heap, bytes);
}

/* Frees a buffer of a connection, or nothing if it is NULL. */
static void buffer_free(struct conn *c, uint8_t *bytes) {
    if (!bytes)
        return;
    conn_count(c, BUFFERED, -(ptrdiff_t)block_cost(bytes));
    conn_free_bytes(c, bytes);
}

/* Frees a stream with its buffers, and removes it from its connection. */
static void stream_free(struct stream *s) {
    struct conn *c = s->conn;
    if (c->head == s)
        c->head = NULL;
    if (s->next)
        s->next->link = s->link;
    *s->link = s->next;
    conn_count(c, STREAMS, -1);
    c->unread -= s->reply_len;
    buffer_free(c, s->body);
    buffer_free(c, s->reply);
    conn_free_bytes(c, s);
}

/* Logs the uses of KEKs by a method of a connection since the last such line, and sets the counts to zero. */
static void trace_log(struct conn *c, enum rpc rpc) {
    struct trace *t = &c->traces[rpc];
    if (server_may_log(c->server, c->user))
        log_line(LOG_INFO, "msg=used pid=%d uid=%u service=%s method=%s key_id=%s count=%llu failed=%llu", c->peer.pid,
                 c->peer.uid, rpcs[rpc].service, rpcs[rpc].method, t->several ? "several" : t->kek ? t->kek->key_id : "",
                 (unsigned long long)t->uses, (unsigned long long)t->failures);
    t->several = false;
    t->uses = t->failures = 0;
    t->due_ms = c->server->now_ms + MINUTE_MS;
}

/*
 * Counts one use of a KEK. The first use of each KEK by a method is logged at once. Later
 * uses are collected and logged once a minute.
 */
static void trace_use(struct conn *c, enum rpc rpc, const struct answer *a) {
    struct trace *t = &c->traces[rpc];
    unsigned kek = a->kek ? 1u << (a->kek - c->server->kms.ring->keks) : 0;
    bool failed = a->code != GRPC_OK, first = kek & ~t->keks;
    if (first && t->uses > 0)
        trace_log(c, rpc);
    if (a->kek) {
        t->several |= t->uses > 0 && t->kek && t->kek != a->kek;
        t->kek = a->kek;
    }
    t->keks |= kek;
    t->uses++;
    t->failures += failed;
    c->user->uses[rpc]++;
    c->user->failures[rpc] += failed;
    if (first || c->server->now_ms >= t->due_ms)
        trace_log(c, rpc);
    else
        server_due(c->server, t->due_ms);
}

/* Logs the traces of a connection that are due, or all of them if `end` is set. */
static void traces_log(struct conn *c, bool end) {
    for (enum rpc rpc = 0; rpc < RPC_UNKNOWN; rpc++) {
        if (c->traces[rpc].uses == 0)
            continue;
        if (end || c->server->now_ms >= c->traces[rpc].due_ms)
            trace_log(c, rpc);
        else
            server_due(c->server, c->traces[rpc].due_ms);
    }
}

/*
 * Closes a connection and frees all that it owns. The structure itself remains, because
 * callers up the stack may still look at it; server_reap frees it at the end of the turn. A
 * callback of the connection's own session must not call this function. `why` is for the log.
 */
static void conn_close(struct conn *c, const char *why) {
    if (c->closed)
        return;
    traces_log(c, true);
    if (c->error != 0)
        log_line(LOG_DEBUG, "msg=closed pid=%d uid=%u reason=\"protocol error\" code=%u", c->peer.pid, c->peer.uid, c->error);
    else
        log_line(LOG_DEBUG, "msg=closed pid=%d uid=%u reason=%s", c->peer.pid, c->peer.uid, why);
    c->closed = true;
    while (c->streams) /* nghttp2_session_del does not call on_stream_close */
        stream_free(c->streams);
    buffer_free(c, c->out);
    c->out = NULL;
    if (!c->broken)
        nghttp2_session_del(c->session);
    conn_count(c, HELD, -(ptrdiff_t)c->used[HELD]); /* zero already, except after a broken session */
    conn_count(c, CONNECTIONS, -1);
    close(c->source.fd);
}

/*
 * The user who holds most of a resource, or NULL if nobody holds any. The user `asking` is
 * counted with the `more` units that it asks for, and is chosen in a tie.
 */
static struct user *server_heaviest_user(struct server *s, enum resource r, const struct user *asking, size_t more) {
    struct user *heaviest = NULL;
    size_t most = 0;
    for (size_t i = 0; i < s->user_count; i++) {
        struct user *u = &s->users[i];
        size_t used = u->used[r] + (u == asking ? more : 0);
        if (u->used[r] > 0 && (used > most || (used == most && u == asking))) {
            heaviest = u;
            most = used;
        }
    }
    return heaviest;
}

/* The connection of a user that holds most of a resource, or NULL if the user has none. */
static struct conn *server_heaviest_conn(const struct server *s, const struct user *user, enum resource r) {
    struct conn *heaviest = NULL;
    for (struct conn *c = s->conns; c; c = c->next)
        if (!c->closed && c->user == user && (!heaviest || c->used[r] > heaviest->used[r]))
            heaviest = c;
    return heaviest;
}

/*
 * Closes the connection of a user that holds most of a resource. Returns false, and closes
 * nothing, if the user has no connection or if that connection is `self`.
 */
static bool server_shed(struct server *s, struct user *user, enum resource r, const struct conn *self) {
    struct conn *c = server_heaviest_conn(s, user, r);
    if (!c || c == self)
        return false;
    if (server_may_log(s, user))
        log_line(LOG_WARN, "msg=shed pid=%d uid=%u streams=%zu buffered=%zu held=%zu", c->peer.pid, c->peer.uid,
                 c->used[STREAMS], c->used[BUFFERED], c->used[HELD]);
    conn_close(c, "holds most");
    return true;
}

/*
 * Closes other connections until a connection may take `more` units of a resource. Returns
 * false if this connection itself would be the next to close.
 */
static bool conn_make_room(const struct conn *c, enum resource r, size_t more) {
    struct server *s = c->server;
    while (s->used[r] + more > s->limit[r])
        if (!server_shed(s, server_heaviest_user(s, r, c->user, more), r, c))
            return false;
    return true;
}

/* Whether a connection may take `more` units of a resource. Makes room for them if necessary. */
static bool conn_has_room(const struct conn *c, enum resource r, size_t more) {
    return c->server->used[r] + more <= c->server->limit[r] || conn_make_room(c, r, more);
}

/*
 * Allocates counted memory for a connection. Returns NULL if there is no room; the caller
 * then fails, and the loop closes the connection.
 */
static void *conn_new_bytes(struct conn *c, size_t size) {
    void *bytes = conn_has_room(c, HELD, heap_cost(size)) ? heap_new(&c->server->heap, size) : NULL;
    if (bytes)
        conn_count(c, HELD, (ptrdiff_t)block_cost(bytes));
    return bytes;
}

/* Allocates memory for a request or an answer. Returns NULL as conn_new_bytes does. */
static uint8_t *buffer_new(struct conn *c, size_t size) {
    uint8_t *bytes = conn_has_room(c, BUFFERED, heap_cost(size)) ? conn_new_bytes(c, size) : NULL;
    if (bytes)
        conn_count(c, BUFFERED, (ptrdiff_t)block_cost(bytes));
    return bytes;
}

/*
 * The functions of nghttp2_mem. They count a session's own memory for its connection. They do
 * not enforce a limit, because nghttp2 1.52 does not survive every failed allocation. (If its
 * queue cannot grow, it frees an item of nghttp2_submit_data and keeps a pointer to it.)
 * conn_settle applies the limit after the session has returned. If the system itself has no
 * memory left, the session is marked as broken and is never deleted: a leak is safer than
 * nghttp2's clean-up.
 */
static void *session_malloc(size_t size, void *conn) {
    struct conn *c = conn;
    void *bytes = heap_new(&c->server->heap, size);
    if (!bytes) {
        c->broken = true;
        return NULL;
    }
    conn_count(c, HELD, (ptrdiff_t)block_cost(bytes));
    return bytes;
}

static void session_free(void *bytes, void *conn) {
    if (bytes)
        conn_free_bytes(conn, bytes);
}

static void *session_calloc(size_t n, size_t size, void *conn) {
    void *bytes = size > 0 && n > SIZE_MAX / size ? NULL : session_malloc(n * size, conn);
    return bytes ? memset(bytes, 0, n * size) : NULL;
}

/* Like realloc. The old bytes are copied to a new block and wiped, so no copy stays behind. */
static void *session_realloc(void *bytes, size_t size, void *conn) {
    void *moved = session_malloc(size, conn);
    if (moved && bytes) {
        size_t old = block_of(bytes)->size;
        memcpy(moved, bytes, old < size ? old : size);
        conn_free_bytes(conn, bytes);
    }
    return moved;
}

/*
 * Applies the limit to a connection after its session has run. (For the IN_BYTES of one read
 * a session takes some 600 KiB at most.) Returns 0, or -1 if the connection must be closed.
 */
static int conn_settle(struct conn *c) {
    return !c->broken && conn_has_room(c, HELD, 0) ? 0 : -1;
}

/* Adds a stream to a connection. Returns NULL if there is no room for it. */
static struct stream *stream_new(struct conn *c, int32_t id) {
    struct server *server = c->server;
    struct stream *s = NULL;
    if (conn_has_room(c, STREAMS, 1))
        s = conn_new_bytes(c, sizeof *s);
    if (!s)
        return NULL;
    memset(s, 0, sizeof *s);
    s->conn = c;
    s->id = id;
    s->start_us = server->now_us;
    s->deadline_ms = server->now_ms + REQUEST_TIMEOUT_MS;
    server_due(server, s->deadline_ms);
    request_init(&s->request);
    s->link = &c->streams;
    if ((s->next = c->streams))
        s->next->link = &s->next;
    c->streams = s;
    conn_count(c, STREAMS, 1);
    return s;
}

/* ------------------------------------------------------------------ HTTP/2
 *
 * The server's side of HTTP/2 (RFC 9113), with the library nghttp2. An HTTP/2 connection
 * carries many requests at once, each on a stream with a number. All bytes travel in frames.
 * HEADERS carries header fields; HPACK compresses them with tables that both sides keep. DATA
 * carries a body. SETTINGS announces limits, WINDOW_UPDATE permits more DATA, RST_STREAM ends
 * one stream, and GOAWAY ends the connection. The flag END_STREAM marks the last frame of a
 * request or of a response.
 *
 * nghttp2 parses and builds the frames, and keeps the windows and HPACK tables. It calls the
 * functions on_..., which stand in the order of a stream's life: begun, head read, body read,
 * answered, closed. Unless its comment says otherwise, such a callback returns 0, or
 * NGHTTP2_ERR_CALLBACK_FAILURE to end the connection. A function stream_... with an int as
 * its result returns 0 or an error code of nghttp2.
 *
 * A window is the number of bytes that the peer may still send. Each stream has a window, and
 * so has the connection. A stream's window holds the largest request, and is never extended.
 * The connection's window is extended by the DATA that has arrived, unless the peer leaves
 * too many answers unread; its new requests must then wait.
 *
 * This section neither reads nor writes the socket: section Connections does.
 */

/* A header field from two string constants, which nghttp2 does not copy. */
#define FIELD(n, v)                                                                                         \
    {(uint8_t *)(n), (uint8_t *)(v), sizeof(n) - 1, sizeof(v) - 1,                                          \
     NGHTTP2_NV_FLAG_NO_COPY_NAME | NGHTTP2_NV_FLAG_NO_COPY_VALUE}

/* A header field whose value nghttp2 copies. The name must be a constant. */
static nghttp2_nv field_copied(const char *name, const char *value, size_t len) {
    return (nghttp2_nv){(uint8_t *)(uintptr_t)name, (uint8_t *)(uintptr_t)value, strlen(name), len,
                        NGHTTP2_NV_FLAG_NO_COPY_NAME};
}

/*
 * Turns an error code of nghttp2 into a callback's result. Errors that are not fatal concern
 * one stream only, and are ignored.
 */
static int callback_result(int rv) {
    return nghttp2_is_fatal(rv) ? NGHTTP2_ERR_CALLBACK_FAILURE : 0;
}

/* Ends a stream with RST_STREAM and an error code of HTTP/2. */
static int stream_reset(struct stream *s, uint32_t error) {
    s->state = STREAM_ANSWERED;
    return nghttp2_submit_rst_stream(s->conn->session, NGHTTP2_FLAG_NONE, s->id, error);
}

/*
 * Extends the peer's window by the bytes received, unless the peer has too many unread
 * answers. Returns 0 or an error code of nghttp2.
 */
static int conn_consume(struct conn *c) {
    if (c->unconsumed == 0 || c->unread > UNREAD_PAUSE_BYTES)
        return 0;
    size_t n = c->unconsumed;
    c->unconsumed = 0;
    return nghttp2_session_consume_connection(c->session, n);
}

/*
 * Tells nghttp2 the length of the next DATA frame of a response, at most `len`. on_send_data
 * then copies the bytes from the reply to the output. The bytes are therefore copied only
 * once, from a buffer that is wiped. The trailers are submitted with the last piece. Returns
 * the length.
 */
static ssize_t on_data_source_read(nghttp2_session *session, int32_t id, uint8_t *buf, size_t len, uint32_t *flags,
                                   nghttp2_data_source *source, void *conn) {
    (void)buf;
    (void)conn;
    static nghttp2_nv trailers[] = {FIELD("grpc-status", "0")};
    struct stream *s = source->ptr;
    size_t left = s->reply_len - s->reply_sent;
    *flags |= NGHTTP2_DATA_FLAG_NO_COPY;
    if (left > len)
        return (ssize_t)len;
    *flags |= NGHTTP2_DATA_FLAG_EOF;
    if (s->reply_grpc) {
        *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
        if (nghttp2_submit_trailer(session, id, trailers, 1) != 0)
            return NGHTTP2_ERR_CALLBACK_FAILURE;
    }
    return (ssize_t)left;
}

/*
 * Submits a response with `count` header fields and a body. The body has a gRPC prefix if
 * `grpc` is set, and then a copy of the `len` bytes. If `bytes` is NULL, there is no body.
 */
static int stream_respond(struct stream *s, const nghttp2_nv *fields, size_t count, const uint8_t *bytes, size_t len,
                          bool grpc) {
    struct conn *c = s->conn;
    nghttp2_data_provider body = {.source.ptr = s, .read_callback = on_data_source_read};
    s->state = STREAM_ANSWERED;
    s->deadline_ms = c->server->now_ms + UNREAD_TIMEOUT_MS;
    server_due(c->server, s->deadline_ms);
    if (bytes) {
        size_t prefix = grpc ? GRPC_PREFIX_BYTES : 0;
        s->reply = buffer_new(c, prefix + len);
        if (!s->reply)
            return NGHTTP2_ERR_NOMEM;
        if (grpc)
            grpc_prefix_write(s->reply, len);
        memcpy(s->reply + prefix, bytes, len);
        s->reply_len = prefix + len;
        s->reply_grpc = grpc;
        c->unread += s->reply_len;
    }
    return nghttp2_submit_response(c->session, s->id, fields, count, bytes ? &body : NULL);
}

/* Answers a gRPC request with a response, or with a status in trailers alone. Counts and logs it. */
static int stream_answer(struct stream *s, const struct answer *a) {
    static const nghttp2_nv ok[] = {FIELD(":status", "200"), FIELD("content-type", "application/grpc")};
    struct server *server = s->conn->server;
    uint64_t us = (uint64_t)monotonic_us() - s->start_us;
    metrics_count(&server->metrics, s->request.rpc, a->code, us);
    if (rpc_uses_kek(s->request.rpc))
        trace_use(s->conn, s->request.rpc, a);
    if (log_level >= LOG_DEBUG)
        log_line(LOG_DEBUG, "msg=rpc method=%s uid=%.*s key_id=%.*s code=%s us=%llu", rpcs[s->request.rpc].path,
                 LOG_VALUE_MAX, a->uid, LOG_VALUE_MAX, a->key_id, grpc_code_name(a->code), (unsigned long long)us);
    if (a->code == GRPC_OK)
        return stream_respond(s, ok, sizeof ok / sizeof *ok, a->bytes, a->len, true);
    char status[4], message[MESSAGE_TEXT_MAX];
    struct text t = {.buf = status, .cap = sizeof status};
    text_add(&t, "%d", (int)a->code);
    nghttp2_nv error[] = {ok[0], ok[1], field_copied("grpc-status", status, t.len),
                          field_copied("grpc-message", message, percent_encode(a->message, message, sizeof message)),
                          FIELD("grpc-accept-encoding", "identity")};
    return stream_respond(s, error, sizeof error / sizeof *error, NULL, 0, true);
}

static int stream_fail(struct stream *s, enum grpc_code code, const char *message) {
    struct answer a = {.code = code, .message = message, .uid = "", .key_id = ""};
    return stream_answer(s, &a);
}

/* Answers with an HTTP status of three digits and no body. It is for requests that do not use gRPC. */
static int stream_http_error(struct stream *s, const char *status) {
    nghttp2_nv fields[] = {field_copied(":status", status, 3), FIELD("allow", "POST")};
    return stream_respond(s, fields, strcmp(status, "405") == 0 ? 2 : 1, NULL, 0, false);
}

/*
 * Renders the text of /metrics, once for all requests in a turn. The arena is not in use at
 * this time. Returns 0, or -1 without memory.
 */
static int server_render(struct server *s) {
    struct arena *arena = &s->kms.arena;
    struct text t = {.cap = METRICS_BYTES};
    if (s->page)
        return 0;
    t.buf = arena_new(arena, t.cap);
    metrics_write(&s->metrics, s->kms.ring->keks[0].key_id, s->used[CONNECTIONS], s->users, s->user_count, &t);
    s->page = malloc(t.len);
    s->page_len = t.len;
    if (s->page)
        memcpy(s->page, t.buf, t.len);
    arena_reset(arena);
    return s->page ? 0 : -1;
}

/*
 * Answers GET /metrics. The request is short and the answer long, so a peer with many unread
 * answers gets status 503. The status is also 503 if there is no memory to render the page.
 */
static int stream_metrics(struct stream *s) {
    static const nghttp2_nv fields[] = {FIELD(":status", "200"),
                                        FIELD("content-type", "text/plain; version=0.0.4; charset=utf-8")};
    struct server *server = s->conn->server;
    if (s->conn->unread > UNREAD_PAUSE_BYTES || server_render(server) < 0)
        return stream_http_error(s, "503");
    return stream_respond(s, fields, sizeof fields / sizeof *fields, server->page, server->page_len, false);
}

/* The stream with this number, or NULL. */
static struct stream *stream_find(nghttp2_session *session, int32_t id) {
    return nghttp2_session_get_stream_user_data(session, id);
}

/*
 * A frame begins. PRIORITY frames are ignored. On stream 0 such a frame is an error of the
 * connection (RFC 9113 6.3), which nghttp2 does not notice.
 */
static int on_begin_frame(nghttp2_session *session, const nghttp2_frame_hd *frame, void *conn) {
    (void)conn;
    if (frame->type != NGHTTP2_PRIORITY || frame->stream_id != 0)
        return 0;
    return callback_result(nghttp2_session_terminate_session(session, NGHTTP2_PROTOCOL_ERROR));
}

/*
 * A header block begins: of a new request, or of trailers. c->head is NULL for trailers of a
 * stream that is already gone.
 */
static int on_begin_headers(nghttp2_session *session, const nghttp2_frame *frame, void *conn) {
    struct conn *c = conn;
    if (frame->headers.cat != NGHTTP2_HCAT_REQUEST) { /* trailers */
        c->head = stream_find(session, frame->hd.stream_id);
        return 0;
    }
    c->head = stream_new(c, frame->hd.stream_id);
    if (!c->head)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    return callback_result(nghttp2_session_set_stream_user_data(session, frame->hd.stream_id, c->head));
}

/* One header field. Names and values are already decompressed. */
static int on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                     const uint8_t *value, size_t len, uint8_t flags, void *conn) {
    (void)session;
    (void)frame;
    (void)flags;
    struct stream *s = ((struct conn *)conn)->head;
    if (s)
        request_field(&s->request, name, name_len, value, len);
    return 0;
}

/*
 * The head is complete. Rejects a wrong request at once. Any other request waits for its end.
 * A shorter grpc-timeout replaces the deadline.
 */
static int stream_head_end(struct stream *s) {
    struct request *r = &s->request;
    request_head_end(r);
    if (r->malformed)
        return stream_reset(s, NGHTTP2_PROTOCOL_ERROR);
    if (r->field_bytes > FIELDS_MAX_BYTES)
        return stream_fail(s, GRPC_RESOURCE_EXHAUSTED, "the header list is over 16384 bytes");
    s->state = STREAM_BODY;
    if (r->method == METHOD_GET)
        return r->metrics ? 0 : stream_http_error(s, "404");
    if (r->method != METHOD_POST)
        return stream_http_error(s, "405");
    if (!r->grpc)
        return stream_http_error(s, "415");
    if (r->rpc == RPC_UNKNOWN)
        return stream_fail(s, GRPC_UNIMPLEMENTED, "no such method: this is a KMS plugin, v2 and v1beta1");
    if (r->bad_timeout)
        return stream_fail(s, GRPC_INTERNAL, "grpc-timeout is not one to eight digits and a unit");
    if (r->timeout_us < (uint64_t)REQUEST_TIMEOUT_MS * 1000) {
        s->deadline_ms = s->conn->server->now_ms + (int64_t)(r->timeout_us + 999) / 1000;
        server_due(s->conn->server, s->deadline_ms);
    }
    return 0;
}

/* The gRPC prefix is complete. Takes the length of the message from it, or answers with an error. */
static int stream_prefix_end(struct stream *s) {
    size_t len = grpc_prefix_len(s->prefix);
    if (s->prefix[0] == 1)
        return stream_fail(s, GRPC_UNIMPLEMENTED, "compressed messages are not supported, only identity");
    if (s->prefix[0] != 0)
        return stream_fail(s, GRPC_INTERNAL, "the compressed flag is neither 0 nor 1");
    if (len > MESSAGE_MAX)
        return stream_fail(s, GRPC_RESOURCE_EXHAUSTED, "the message is over 65536 bytes");
    s->body_cap = len;
    return 0;
}

/* Takes a piece of a request's body. The pieces need not end where prefix and message end. */
static int stream_append(struct stream *s, const uint8_t *data, size_t len) {
    if (s->prefix_len < GRPC_PREFIX_BYTES) {
        size_t missing = GRPC_PREFIX_BYTES - s->prefix_len, n = len < missing ? len : missing;
        memcpy(s->prefix + s->prefix_len, data, n);
        s->prefix_len += n;
        data += n;
        len -= n;
        if (n < missing)
            return 0;
        int rv = stream_prefix_end(s);
        if (rv != 0 || s->state == STREAM_ANSWERED)
            return rv;
    }
    if (len > s->body_cap - s->body_len)
        return stream_fail(s, GRPC_INTERNAL, "more than one message in a unary call");
    if (len > 0) {
        if (!s->body && !(s->body = buffer_new(s->conn, s->body_cap)))
            return NGHTTP2_ERR_NOMEM;
        memcpy(s->body + s->body_len, data, len);
    }
    s->body_len += len;
    return 0;
}

/*
 * A piece of a DATA frame. Bytes for a stream that is answered or gone are dropped, but count
 * for the window.
 */
static int on_data_chunk_recv(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data, size_t len,
                              void *conn) {
    (void)flags;
    struct conn *c = conn;
    struct stream *s = stream_find(session, id);
    int rv = 0;
    c->unconsumed += len;
    if (s && s->state == STREAM_BODY) {
        s->received += len;
        if (s->received > s->request.content_length)
            rv = stream_reset(s, NGHTTP2_PROTOCOL_ERROR);
        else if (s->request.method == METHOD_POST)
            rv = stream_append(s, data, len);
    }
    return callback_result(rv);
}

/* The request is complete. Answers it, unless it has been answered. */
static int stream_end(struct stream *s) {
    struct kms *kms = &s->conn->server->kms;
    struct answer a;
    const uint8_t *message = s->body ? s->body : s->prefix; /* never NULL */
    if (s->state != STREAM_BODY)
        return 0; /* answered before its end */
    if (s->request.content_length != UINT64_MAX && s->request.content_length != s->received)
        return stream_reset(s, NGHTTP2_PROTOCOL_ERROR); /* RFC 9113 8.1.1 */
    if (s->request.method == METHOD_GET)
        return stream_metrics(s);
    if (s->prefix_len < GRPC_PREFIX_BYTES || s->body_len < s->body_cap)
        return stream_fail(s, GRPC_INTERNAL, "the message is missing or incomplete");
    kms_call(kms, s->request.rpc, message, s->body_len, &a);
    buffer_free(s->conn, s->body);
    s->body = NULL;
    int rv = stream_answer(s, &a);
    kms_done(kms);
    return rv;
}

/* The trailers of a request are complete. They must be well-formed, and must end the request. */
static int stream_trailers_end(struct stream *s, bool end) {
    bool sound = end && !s->request.malformed && s->request.field_bytes <= FIELDS_MAX_BYTES;
    return sound ? 0 : stream_reset(s, NGHTTP2_PROTOCOL_ERROR);
}

/* A frame is complete. A header block may have several frames, and this is called for it once. */
static int on_frame_recv(nghttp2_session *session, const nghttp2_frame *frame, void *conn) {
    struct conn *c = conn;
    if (frame->hd.type == NGHTTP2_SETTINGS) {
        c->greeted = true;
        return 0;
    }
    if (frame->hd.type != NGHTTP2_HEADERS && frame->hd.type != NGHTTP2_DATA)
        return 0;
    struct stream *s = stream_find(session, frame->hd.stream_id);
    bool end = frame->hd.flags & NGHTTP2_FLAG_END_STREAM;
    int rv = 0;
    if (!s)
        return 0;
    if (frame->hd.type == NGHTTP2_HEADERS && s->state == STREAM_HEAD)
        rv = stream_head_end(s);
    else if (frame->hd.type == NGHTTP2_HEADERS && s->state == STREAM_BODY)
        rv = stream_trailers_end(s, end);
    s->ended = end;
    if (rv == 0 && end)
        rv = stream_end(s);
    return callback_result(rv);
}

/*
 * Appends to the output. conn_send has emptied it and writes it to the socket later. Appends
 * everything and returns 0, or appends nothing and returns NGHTTP2_ERR_WOULDBLOCK; nghttp2
 * then offers the same bytes again.
 */
static int out_append(struct server *s, const uint8_t *head, size_t head_len, const uint8_t *data, size_t len) {
    if (head_len + len > OUT_BYTES - s->out_len)
        return NGHTTP2_ERR_WOULDBLOCK;
    memcpy(s->out + s->out_len, head, head_len);
    memcpy(s->out + s->out_len + head_len, data, len);
    s->out_len += head_len + len;
    return 0;
}

/* Appends frames to the output. Returns len or NGHTTP2_ERR_WOULDBLOCK. */
static ssize_t on_send(nghttp2_session *session, const uint8_t *data, size_t len, int flags, void *conn) {
    (void)session;
    (void)flags;
    int rv = out_append(((struct conn *)conn)->server, data, len, data, 0);
    return rv == 0 ? (ssize_t)len : rv;
}

/*
 * Appends a DATA frame of `len` bytes, the length that on_data_source_read returned. `head`
 * is the frame's header of 9 bytes. Returns 0 or NGHTTP2_ERR_WOULDBLOCK.
 */
static int on_send_data(nghttp2_session *session, nghttp2_frame *frame, const uint8_t *head, size_t len,
                        nghttp2_data_source *source, void *conn) {
    (void)session;
    (void)frame;
    struct stream *s = source->ptr;
    int rv = out_append(((struct conn *)conn)->server, head, 9, s->reply + s->reply_sent, len);
    if (rv == 0)
        s->reply_sent += len;
    return rv;
}

/*
 * A frame is in the output. The error code of a GOAWAY is kept for the log. If the answer is
 * complete and the request is not, RST_STREAM tells the peer to stop sending (RFC 9113 8.1).
 */
static int on_frame_send(nghttp2_session *session, const nghttp2_frame *frame, void *conn) {
    if (frame->hd.type == NGHTTP2_GOAWAY)
        ((struct conn *)conn)->error = frame->goaway.error_code;
    if (frame->hd.type != NGHTTP2_HEADERS || !(frame->hd.flags & NGHTTP2_FLAG_END_STREAM))
        return 0;
    struct stream *s = stream_find(session, frame->hd.stream_id);
    return s && !s->ended ? callback_result(stream_reset(s, NGHTTP2_NO_ERROR)) : 0;
}

/* A stream has ended, by both sides or by a reset. */
static int on_stream_close(nghttp2_session *session, int32_t id, uint32_t error, void *conn) {
    (void)error;
    (void)conn;
    struct stream *s = stream_find(session, id);
    if (s)
        stream_free(s);
    return 0;
}

/* The options of a session, or NULL without memory. */
static nghttp2_option *session_options_new(void) {
    nghttp2_option *options;
    if (nghttp2_option_new(&options) != 0)
        return NULL;
    nghttp2_option_set_no_http_messaging(options, 1);     /* see section HTTP requests */
    nghttp2_option_set_no_auto_window_update(options, 1); /* see conn_consume */
    nghttp2_option_set_no_closed_streams(options, 1);     /* saves 60 KB per connection */
    return options;
}

/* Sets up the callbacks and options that all sessions share. Returns 0, or -1 without memory. */
static int sessions_init(struct server *s) {
    s->session_options = session_options_new();
    if (!s->session_options || nghttp2_session_callbacks_new(&s->callbacks) != 0)
        return -1;
    nghttp2_session_callbacks_set_on_begin_frame_callback(s->callbacks, on_begin_frame);
    nghttp2_session_callbacks_set_on_begin_headers_callback(s->callbacks, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(s->callbacks, on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(s->callbacks, on_data_chunk_recv);
    nghttp2_session_callbacks_set_on_frame_recv_callback(s->callbacks, on_frame_recv);
    nghttp2_session_callbacks_set_send_callback(s->callbacks, on_send);
    nghttp2_session_callbacks_set_send_data_callback(s->callbacks, on_send_data);
    nghttp2_session_callbacks_set_on_frame_send_callback(s->callbacks, on_frame_send);
    nghttp2_session_callbacks_set_on_stream_close_callback(s->callbacks, on_stream_close);
    return 0;
}

/* Makes a connection's session, and submits the SETTINGS. Returns 0, or -1 without memory. */
static int session_init(struct conn *c) {
    static const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, STREAMS_MAX},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW_BYTES},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, FIELDS_MAX_BYTES},
        {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1}, /* no tree of priorities to keep */
    };
    nghttp2_mem memory = {c, session_malloc, session_free, session_calloc, session_realloc};
    if (nghttp2_session_server_new3(&c->session, c->server->callbacks, c, c->server->session_options, &memory) != 0)
        return -1;
    const size_t count = sizeof settings / sizeof *settings;
    return nghttp2_submit_settings(c->session, NGHTTP2_FLAG_NONE, settings, count) == 0 ? 0 : -1;
}

/* ------------------------------------------------------------- Connections
 *
 * Reading, writing and closing a connection. A connection waits either for bytes to read or
 * for room to write, never for both. While a peer does not take its answers, the server reads
 * nothing more from it.
 *
 * A connection reads at most one buffer in a turn, and passes it to nghttp2. Output collects
 * in one buffer of the server. Only bytes that the socket does not take are copied to a
 * buffer of the connection (c->out).
 *
 * Nothing here interprets bytes or decides about deadlines: the sections HTTP/2 and Event
 * loop do.
 */

/* Makes epoll wait for room to write, or for bytes to read. Returns 0, or -1 with errno. */
static int conn_watch(struct conn *c, bool writing) {
    if (c->writing == writing)
        return 0;
    c->writing = writing;
    struct epoll_event event = {.events = writing ? EPOLLOUT : EPOLLIN, .data.ptr = &c->source};
    return epoll_ctl(c->server->epoll, EPOLL_CTL_MOD, c->source.fd, &event);
}

/* Like write(2), except that a full socket makes the result 0. Returns -1 if the peer is gone. */
static ssize_t conn_write(struct conn *c, const uint8_t *bytes, size_t len) {
    ssize_t n;
    do
        n = write(c->source.fd, bytes, len);
    while (n < 0 && errno == EINTR);
    return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) ? 0 : n;
}

/*
 * Keeps the bytes that the socket did not take. Nothing is read until they are sent. Returns
 * 0, or -1 if the connection must be closed.
 */
static int conn_keep(struct conn *c, const uint8_t *bytes, size_t len) {
    c->out = buffer_new(c, len);
    if (!c->out)
        return -1;
    memcpy(c->out, bytes, len);
    c->out_len = len;
    c->out_sent = 0;
    c->out_deadline_ms = c->server->now_ms + UNREAD_TIMEOUT_MS;
    server_due(c->server, c->out_deadline_ms);
    return conn_watch(c, true);
}

/*
 * Sends the bytes that conn_keep has kept. Returns 1 if none are left, 0 if the socket is
 * still full, -1 if the connection must be closed.
 */
static int conn_resume(struct conn *c) {
    if (!c->out)
        return 1;
    ssize_t n = conn_write(c, c->out + c->out_sent, c->out_len - c->out_sent);
    if (n < 0)
        return -1;
    c->out_sent += (size_t)n;
    if (c->out_sent < c->out_len)
        return 0;
    buffer_free(c, c->out);
    c->out = NULL;
    return 1;
}

/*
 * Fills the output with as many frames of the session as fit, and writes it to the socket.
 * Bytes that the socket does not take are kept in c->out. Returns the number of bytes in the
 * output, or -1 if the connection must be closed.
 */
static ssize_t conn_send(struct conn *c) {
    struct server *s = c->server;
    s->out_len = 0;
    int rv = conn_consume(c);
    if (rv == 0)
        rv = nghttp2_session_send(c->session);
    if (rv == 0)
        rv = conn_settle(c);
    ssize_t n = rv != 0 ? -1 : s->out_len == 0 ? 0 : conn_write(c, s->out, s->out_len);
    if (n >= 0 && (size_t)n < s->out_len && conn_keep(c, s->out + n, s->out_len - (size_t)n) < 0)
        n = -1;
    wipe(s->out, s->out_len);
    return n < 0 ? -1 : (ssize_t)s->out_len;
}

/*
 * Sends all that can be sent. Afterwards there are two cases. If the socket is full, c->out
 * has the rest, and epoll waits for room to write. Otherwise nothing is left to send, and
 * epoll waits for bytes to read. Returns 0, or -1 if the connection must be closed.
 */
static int conn_flush(struct conn *c) {
    int resumed;
    while ((resumed = conn_resume(c)) > 0) {
        ssize_t sent = conn_send(c);
        if (sent < 0)
            return -1;
        if (sent == 0) {
            bool ended = !nghttp2_session_want_read(c->session) && !nghttp2_session_want_write(c->session);
            return ended ? -1 : conn_watch(c, false);
        }
    }
    return resumed;
}

/* Reads at most s->share bytes, handles them, and sends the answers. Returns as conn_flush does. */
static int conn_read(struct conn *c) {
    struct server *s = c->server;
    ssize_t n = read(c->source.fd, s->in, s->share);
    if (n < 0)
        return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -1;
    if (n == 0)
        return -1;
    c->idle_since_ms = s->now_ms;
    ssize_t used = nghttp2_session_mem_recv(c->session, s->in, (size_t)n);
    wipe(s->in, (size_t)n);
    return used < 0 || conn_settle(c) < 0 ? -1 : conn_flush(c);
}

/*
 * Tells the peer the last stream that is handled, so that it can repeat later requests
 * elsewhere (RFC 9113 6.8). Sends all output. Returns as conn_flush does.
 */
static int conn_goaway(struct conn *c) {
    int32_t last = nghttp2_session_get_last_proc_stream_id(c->session);
    if (nghttp2_submit_goaway(c->session, NGHTTP2_FLAG_NONE, last, NGHTTP2_NO_ERROR, NULL, 0) != 0)
        return -1;
    return conn_flush(c);
}

/* Takes over a descriptor and adds a connection to the server. If that fails, the descriptor is closed. */
static void conn_new(struct server *s, int fd, const struct ucred *peer, struct user *user) {
    struct conn *c = calloc(1, sizeof *c);
    if (!c) {
        close(fd);
        return;
    }
    c->source = (struct source){SOURCE_CONN, fd};
    c->server = s;
    c->user = user;
    c->peer = *peer;
    c->idle_since_ms = s->now_ms;
    c->preface_deadline_ms = s->now_ms + PREFACE_TIMEOUT_MS;
    server_due(s, c->preface_deadline_ms);
    c->next = s->conns;
    s->conns = c;
    conn_count(c, CONNECTIONS, 1);
    s->metrics.accepted++;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &c->source};
    if (epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event) < 0 || session_init(c) < 0 || conn_flush(c) < 0)
        conn_close(c, "set-up failed");
}

/* Frees the structures of closed connections. Nothing points at them at the end of a turn. */
static void server_reap(struct server *s) {
    for (struct conn **at = &s->conns, *c; (c = *at);) {
        if (!c->closed) {
            at = &c->next;
            continue;
        }
        *at = c->next;
        free(c);
    }
}

/*
 * The connection of a user that has been idle longest, or NULL. A connection with an open
 * stream is not idle.
 */
static struct conn *server_idlest(const struct server *s, const struct user *user) {
    struct conn *idlest = NULL;
    for (struct conn *c = s->conns; c; c = c->next)
        if (!c->closed && !c->streams && c->user == user &&
            (!idlest || c->idle_since_ms <= idlest->idle_since_ms)) /* in a tie the older, which is later in the list */
            idlest = c;
    return idlest;
}

/*
 * Closes one connection to make room for a new one. It belongs to the user with most
 * connections, where the new connection already counts for `newcomer` (NULL: for nobody). It is
 * the connection that has been idle longest or, if none is idle, the one that holds most
 * memory. Returns false if there is no connection to close.
 */
static bool server_make_way(struct server *s, const struct user *newcomer) {
    struct user *user = server_heaviest_user(s, CONNECTIONS, newcomer, 1);
    struct conn *c = server_idlest(s, user);
    if (!c)
        return server_shed(s, user, HELD, NULL);
    conn_goaway(c);
    conn_close(c, "gives way");
    return true;
}

/* --------------------------------------------------------------- Endpoints
 *
 * The sockets of the server: their names, checks of their directories, binding, and sockets
 * inherited from systemd.
 *
 * An endpoint is the same string, byte for byte, as in Kubernetes' EncryptionConfiguration:
 * unix:///path, or unix:///@name for a name in Linux's abstract name space. An abstract name
 * is not a file, so nobody needs permission to take it. Its address is a NUL and the name,
 * and the length of the address includes no NUL at the end, just as in Go's clients.
 *
 * A process that replaces the socket receives the DEKs that the API server sends next. This
 * is why every directory on the way to the socket is checked.
 *
 * Nothing here accepts connections or knows who may connect: section Event loop does.
 */

/* Parses an endpoint into a socket address. Returns NULL, or a sentence that says why the endpoint is wrong. */
static const char *endpoint_parse(const char *endpoint, struct sockaddr_un *address, socklen_t *address_len) {
    static const char scheme[] = "unix://";
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    if (strncmp(endpoint, "unix:", 5) != 0)
        return endpoint[0] == '/' || endpoint[0] == '@'
                   ? "it lacks its scheme: write unix:///path or unix:///@name"
                   : "kube-apiserver reaches KMS plugins on UNIX sockets only: unix:///path";
    if (strncmp(endpoint, scheme, sizeof scheme - 1) != 0)
        return "unix: has to be followed by three slashes: unix:///path";
    const char *path = endpoint + sizeof scheme - 1;
    if (path[0] != '/')
        return "after two slashes comes a host name, and a socket has none: write three, and an absolute path";
    for (const char *p = path; *p; p++)
        if (*p == '%' || *p == '?' || *p == '#' || (uint8_t)*p < ' ' || *p == 0x7f)
            return "%, ?, # and control characters mean something else to Go's URL parser";
    bool abstract = path[1] == '@';
    const char *name = abstract ? path + 2 : path;
    size_t len = strlen(name);
    if (len > sizeof address->sun_path - 1)
        return "a socket's path or name has at most 107 bytes";
    if (abstract && len == 0)
        return "the name after @ is empty";
    if (name[len - 1] == '/' && !abstract)
        return "the path ends in a slash: it has to name the socket itself";
    memcpy(address->sun_path + (abstract ? 1 : 0), name, len);
    *address_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len + 1);
    return NULL;
}

/* Parses an endpoint. If it is wrong, the program ends for wrong usage. */
static void endpoint_require(const char *endpoint, struct sockaddr_un *address, socklen_t *address_len) {
    const char *wrong = endpoint_parse(endpoint, address, address_len);
    if (wrong)
        die_usage("%s: %s", endpoint, wrong);
}

/* Writes the endpoint of an address as a string, for log lines and messages. Returns `out`. */
static const char *endpoint_name(const struct sockaddr_un *address, socklen_t len, char *out, size_t cap) {
    struct text t = {.buf = out, .cap = cap - 1};
    size_t n = len - offsetof(struct sockaddr_un, sun_path);
    if (n > 0 && address->sun_path[0] == '\0')
        text_add(&t, "unix:///@%.*s", (int)n - 1, address->sun_path + 1);
    else
        text_add(&t, "unix://%.*s", (int)n, address->sun_path);
    out[t.len] = '\0';
    return out;
}

/* Room for any endpoint, and a NUL. */
enum { ENDPOINT_NAME_BYTES = sizeof "unix:///@" + sizeof((struct sockaddr_un *)0)->sun_path };

/*
 * Dies if a user other than root and our own can rename the entries of a directory, or
 * replace a link. Other users may write to a sticky directory, because there only the owner
 * of a file can rename it; directory_check checks the owner of the next name on the way.
 */
static void owner_check(const char *path, const struct stat *st) {
    if (st->st_uid != 0 && st->st_uid != geteuid())
        die("%s: belongs to uid %u, who could put another socket in the place of ours: choose another directory", path,
            st->st_uid);
    if (S_ISDIR(st->st_mode) && (st->st_mode & (S_IWGRP | S_IWOTH)) && !(st->st_mode & S_ISVTX))
        die("%s: others may rename what lies there, and put another socket in the place of ours: "
            "chmod go-w, or choose another directory", path);
}

/* Removes the last name from a path. "/" stays as it is. */
static void path_up(char *path) {
    char *slash = strrchr(path, '/');
    slash[slash == path ? 1 : 0] = '\0';
}

/* Writes "first/second" to `out`. Returns false if it does not fit. */
static bool path_join(char out[WAY_MAX], const char *first, const char *second) {
    struct text t = {.buf = out, .cap = WAY_MAX};
    text_add(&t, "%s%s%s", first, first[0] && first[strlen(first) - 1] == '/' ? "" : "/", second);
    if (t.len == t.cap)
        return false;
    out[t.len] = '\0';
    return true;
}

/*
 * Walks to the directory of a socket as the kernel would, name by name and through links.
 * Dies where a user other than root and our own could rename the next name. In the last
 * directory other users must not be able to write at all. `at` is the part of the way already
 * walked, without links. `rest` is the part that is still to come.
 */
static void directory_check(const char *path) {
    enum { LINKS_MAX = 40 }; /* the kernel's own limit */
    char at[WAY_MAX] = "/", rest[WAY_MAX], next[WAY_MAX], target[WAY_MAX];
    struct stat st;
    if (lstat(at, &st) < 0)
        die("/: stat: %s", strerror(errno));
    owner_check(at, &st);
    copy_text(rest, sizeof rest, (const uint8_t *)path, strlen(path));
    path_up(rest);
    for (int links = 0;;) {
        char *name = rest + strspn(rest, "/"), *end = name + strcspn(name, "/");
        if (name == end)
            break;
        bool last = *end == '\0';
        *end = '\0';
        if (strcmp(name, "..") == 0) {
            path_up(at);
        } else if (strcmp(name, ".") != 0) {
            if (!path_join(next, at, name) || lstat(next, &st) < 0)
                die("%s: the directory of the socket: %s: %s", path, next, strerror(errno));
            owner_check(next, &st);
            ssize_t n = S_ISLNK(st.st_mode) ? readlink(next, target, sizeof target - 1) : 0;
            if (n < 0 || links == LINKS_MAX)
                die("%s: the directory of the socket: %s: %s", path, next, strerror(n < 0 ? errno : ELOOP));
            if (S_ISLNK(st.st_mode)) {
                target[n] = '\0';
                links++;
                if (target[0] == '/')
                    at[1] = '\0';
                if (!path_join(next, target, last ? "" : end + 1))
                    die("%s: the directory of the socket: %s", path, strerror(ENAMETOOLONG));
                memcpy(rest, next, sizeof rest);
                continue;
            }
            memcpy(at, next, sizeof at);
        }
        memmove(rest, last ? end : end + 1, strlen(last ? end : end + 1) + 1);
    }
    if (lstat(at, &st) < 0 || !S_ISDIR(st.st_mode))
        die("%s: the directory of the socket: %s: %s", path, at, strerror(ENOTDIR));
    if (st.st_mode & (S_IWGRP | S_IWOTH))
        die("%s: others may write there, and could take the socket's place between two starts: chmod go-w, "
            "choose another directory, or in a sidecar's emptyDir an abstract socket (unix:///@name)", at);
}

/* Makes a socket that is close-on-exec and non-blocking. Dies if that fails. */
static int socket_new(void) {
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        die("socket: %s", strerror(errno));
    return fd;
}

/*
 * Tries connect(2) and returns its errno: 0 if a process is listening, ECONNREFUSED if none
 * is, EAGAIN if the queue of a listening process is full.
 */
static int socket_try(const struct sockaddr_un *address, socklen_t len) {
    int fd = socket_new();
    int error = connect(fd, (const struct sockaddr *)address, len) < 0 ? errno : 0;
    close(fd);
    return error;
}

static bool same_file(const struct stat *a, const struct stat *b) {
    return a->st_ino == b->st_ino && a->st_dev == b->st_dev;
}

/*
 * Removes the socket that a crashed server has left at the path. Dies, and removes nothing,
 * if a process is listening, if it is unclear whether one is, or if the file is not a socket.
 * A server that is just starting has bound its socket and does not listen yet, so the socket
 * is tried twice.
 */
static void socket_clear(const struct sockaddr_un *address, socklen_t len) {
    const char *path = address->sun_path;
    struct stat before, after;
    if (lstat(path, &before) < 0) {
        if (errno != ENOENT)
            die("%s: stat: %s", path, strerror(errno));
        return;
    }
    if (!S_ISSOCK(before.st_mode))
        die("%s: exists and is not a socket; remove it, or choose another path", path);
    const struct timespec wait = {.tv_nsec = STALE_RETRY_MS * 1000000L};
    for (int look = 0; look < 2; look++) {
        int error = socket_try(address, len);
        if (error == 0 || error == EAGAIN)
            die("%s: another process is listening there", path);
        if (error != ECONNREFUSED)
            die("%s: a socket of uid %u is there, and whether anybody listens on it cannot be told: connect: %s; "
                "if nobody does, remove it", path, before.st_uid, strerror(error));
        if (look == 0)
            nanosleep(&wait, NULL);
    }
    if (lstat(path, &after) < 0 || !same_file(&before, &after) || /* a new file may get the old inode number: */
        after.st_ctim.tv_sec != before.st_ctim.tv_sec || after.st_ctim.tv_nsec != before.st_ctim.tv_nsec)
        die("%s: another process is starting there", path);
    if (unlink(path) < 0)
        die("%s: cannot remove the stale socket of uid %u: unlink: %s", path, before.st_uid, strerror(errno));
}

/* Prepares an endpoint for bind, or dies. */
static void listener_prepare(struct listener *l, const char *endpoint) {
    endpoint_require(endpoint, &l->address, &l->address_len);
    if (l->address.sun_path[0] == '\0')
        return;
    directory_check(l->address.sun_path);
    socket_clear(&l->address, l->address_len);
}

/* A step of listener_open, and advice for its failure. Both are constants. */
struct listen_step {
    const char *call, *hint;
};

/*
 * Binds and listens. The socket's file never has a wider mode than --mode: it is made with
 * mode 0, then gets its group, then its mode, and only then listens. Returns NULL, or the
 * step that failed, with errno set.
 */
static const struct listen_step *listener_open(struct listener *l, const struct serve_options *options) {
    static const struct listen_step bind_file = {"bind", "our user has to be able to write to the socket's directory"},
        bind_again = {"bind", "the path was named twice, or another process is starting there"},
        bind_name = {"bind", "an abstract name is free when no other process has it"},
        stat_file = {"stat", "the new socket has to stay where it is"},
        chown_file = {"chown", "--group takes root with CAP_CHOWN, or a member of that group (in a pod: runAsGroup)"},
        chmod_file = {"chmod", "--mode takes a file system that keeps modes"},
        listen_on = {"listen", "the kernel takes no peers for this socket"};
    const char *path = l->address.sun_path;
    mode_t mask = umask(0777);
    l->source = (struct source){SOURCE_LISTENER, socket_new()};
    int rv = bind(l->source.fd, (struct sockaddr *)&l->address, l->address_len);
    umask(mask);
    if (rv < 0)
        return path[0] == '\0' ? &bind_name : errno == EADDRINUSE ? &bind_again : &bind_file;
    if (path[0] != '\0') {
        if (lstat(path, &l->file) < 0)
            return &stat_file;
        l->made = true;
        if (options->has_group && lchown(path, (uid_t)-1, options->group) < 0)
            return &chown_file;
        if (chmod(path, options->mode) < 0)
            return &chmod_file;
    }
    return listen(l->source.fd, BACKLOG) < 0 ? &listen_on : NULL;
}

/*
 * Takes over a socket that systemd has opened: an AF_UNIX stream socket that listens. Dies if
 * the socket is of another kind.
 */
static void listener_inherit(struct listener *l, int fd) {
    int type = 0, listening = 0;
    socklen_t len = sizeof(int);
    l->source = (struct source){SOURCE_LISTENER, fd};
    l->address_len = sizeof l->address;
    bool right = getsockname(fd, (struct sockaddr *)&l->address, &l->address_len) == 0 &&
                 l->address_len <= sizeof l->address && /* a path of 108 bytes has no room for its NUL */
                 l->address.sun_family == AF_UNIX && l->address_len > offsetof(struct sockaddr_un, sun_path) &&
                 getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &len) == 0 && type == SOCK_STREAM &&
                 getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &len) == 0 && listening;
    if (!right)
        die("LISTEN_FDS: descriptor %d is not a listening UNIX stream socket with a name", fd);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 || fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
        die("LISTEN_FDS: descriptor %d: %s", fd, strerror(errno));
}

/* Removes a file, unless another file has taken its place. */
static void file_remove(const char *path, const struct stat *file) {
    struct stat st;
    if (lstat(path, &st) == 0 && same_file(&st, file))
        unlinkat(AT_FDCWD, path, 0);
}

/* Closes a listener, and removes the file that it has made. */
static void listener_close(struct listener *l) {
    if (l->made)
        file_remove(l->address.sun_path, &l->file);
    close(l->source.fd);
}

static void listeners_close(struct server *s) {
    while (s->listener_count > 0)
        listener_close(&s->listeners[--s->listener_count]);
}

/*
 * The number that a string of decimal digits stands for. -1 if the string is empty or has any
 * other character, or if the number is over `max`.
 */
static long long decimal(const char *s, long long max) {
    long long n = 0;
    if (!*s)
        return -1;
    for (; *s; s++) {
        if (*s < '0' || *s > '9' || (n = 10 * n + (*s - '0')) > max)
            return -1;
    }
    return n;
}

/*
 * Opens all sockets: those of systemd (sd_listen_fds(3)) and those of --listen, or the
 * default endpoint if there are neither. All endpoints are checked before the first is bound.
 * Dies if one fails, after removing the files made so far.
 */
static void listeners_open(struct server *s) {
    const char *pid = getenv("LISTEN_PID"), *fds = getenv("LISTEN_FDS");
    bool ours = pid && fds && decimal(pid, INT_MAX) == getpid();
    if (fds && !ours)
        log_line(LOG_WARN, "msg=\"LISTEN_FDS is not taken: LISTEN_PID is another process, which has to exec this one\" "
                 "listen_pid=%s pid=%d", pid ? pid : "", (int)getpid());
    if (ours) {
        long long n = decimal(fds, INT_MAX);
        if (n < 0 || n > LISTENERS_MAX)
            die("LISTEN_FDS: not a number from 0 to %d", LISTENERS_MAX);
        while ((long long)s->listener_count < n) {
            listener_inherit(&s->listeners[s->listener_count], FIRST_INHERITED + (int)s->listener_count);
            s->listener_count++;
        }
    }
    static const char *const fallback[] = {DEFAULT_ENDPOINT};
    size_t count = s->options->endpoint_count;
    const char *const *endpoints = s->options->endpoints;
    if (count == 0 && s->listener_count == 0)
        endpoints = fallback, count = 1;
    if (count > LISTENERS_MAX - s->listener_count)
        die("more than %d sockets", LISTENERS_MAX);
    for (size_t i = 0; i < count; i++)
        listener_prepare(&s->listeners[s->listener_count + i], endpoints[i]);
    for (size_t i = 0; i < count; i++) {
        const struct listen_step *failed = listener_open(&s->listeners[s->listener_count++], s->options);
        if (!failed)
            continue;
        int error = errno;
        listeners_close(s);
        die("%s: %s: %s; %s", endpoints[i], failed->call, strerror(error), failed->hint);
    }
}

/*
 * Connects a socket to the service manager (sd_notify(3)). Returns -1 if there is no manager
 * or it cannot be reached.
 */
static int notify_open(void) {
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t len = path ? strlen(path) : 0;
    if (len < 2 || len > sizeof address.sun_path || (path[0] != '/' && path[0] != '@'))
        return -1;
    memcpy(address.sun_path, path, len);
    if (path[0] == '@')
        address.sun_path[0] = '\0';
    int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    socklen_t address_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len);
    const struct timeval patience = {.tv_sec = 1}; /* a busy manager gets this time, or it would miss READY=1 */
    if (fd >= 0)
        setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, address_len) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* Tells the service manager a state. A failure is ignored. */
static void notify(int fd, const char *state) {
    if (fd >= 0)
        write_all(fd, state, strlen(state));
}

/* -------------------------------------------------------------- Event loop
 *
 * The loop that runs the server: one thread waits for all descriptors with epoll. A turn has
 * five parts. The loop waits. It handles the ready descriptors, with at most one read for
 * each connection. It ends requests and connections that have passed their deadlines. It
 * wipes the stack. It frees closed connections. Nothing in a turn blocks. Without traffic and
 * deadlines the loop sleeps.
 *
 * A timer descriptor wakes the loop for the next deadline, and stays set from turn to turn. A
 * timeout of epoll_wait would be set up and removed in every turn. This would cost 2 of the
 * 20 or so microseconds that a client waits for an answer.
 *
 * The loop does not know HTTP/2 or the KMS APIs; it calls the sections above.
 */

/*
 * Dies if the clocks or ppoll(2) do not work. Every turn needs them, and an old kernel may
 * lack these calls or an old container runtime may refuse them.
 */
static void clocks_check(void) {
    struct timespec now = {0, 0};
    if (clock_gettime(CLOCK_MONOTONIC, &now) < 0 || clock_gettime(CLOCK_REALTIME, &now) < 0)
        die("clock_gettime: %s", strerror(errno));
    now = (struct timespec){0, 0};
    if (ppoll(NULL, 0, &now, NULL) < 0)
        die("ppoll: %s", strerror(errno));
}

static void server_clock(struct server *s) {
    s->now_us = (uint64_t)monotonic_us();
    s->now_ms = (int64_t)(s->now_us / 1000);
}

/* The user with this uid, or NULL if the uid may not connect. */
static struct user *server_user(struct server *s, uid_t uid) {
    for (size_t i = 0; i < s->user_count; i++)
        if (s->users[i].uid == uid)
            return &s->users[i];
    return NULL;
}

/* Logs refused peers: the first at once, then their number once a second. If `end` is set, logs the rest. */
static void server_log_refused(struct server *s, bool end) {
    if (s->refused_unlogged == 0)
        return;
    if (!end && s->now_ms < s->refused_logged_ms + REFUSED_LOG_MS) {
        server_due(s, s->refused_logged_ms + REFUSED_LOG_MS);
        return;
    }
    log_line(LOG_WARN, "msg=refused pid=%d uid=%u count=%llu", s->refused_peer.pid, s->refused_peer.uid,
             (unsigned long long)s->refused_unlogged);
    s->refused_unlogged = 0;
    s->refused_logged_ms = s->now_ms;
}

/* Makes epoll watch the listeners, or stop watching them. */
static void server_accept_from(struct server *s, bool on) {
    for (size_t i = 0; i < s->listener_count; i++) {
        struct epoll_event event = {.events = on ? EPOLLIN : 0, .data.ptr = &s->listeners[i].source};
        epoll_ctl(s->epoll, EPOLL_CTL_MOD, s->listeners[i].source.fd, &event);
    }
}

/*
 * Handles an error of accept. If this process has used up its descriptors, a connection is
 * closed for the new peer. If no connection can be closed, or if the error is another one (the
 * machine may lack descriptors or memory), the listeners pause for ACCEPT_PAUSE_MS.
 */
static void server_accept_failed(struct server *s, int error) {
    if (error == EMFILE && server_make_way(s, NULL))
        return;
    server_accept_from(s, false);
    s->resume_accept_ms = s->now_ms + ACCEPT_PAUSE_MS;
    server_due(s, s->resume_accept_ms);
}

/* Admits a new peer if its uid may connect; otherwise closes the connection. */
static void server_admit(struct server *s, int fd) {
    struct ucred peer = {.uid = UNMAPPED_UID};
    socklen_t len = sizeof peer;
    bool told = getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) == 0;
    struct user *user = told ? server_user(s, peer.uid) : NULL;
    if (!user) {
        close(fd);
        s->metrics.refused++;
        s->refused_unlogged++;
        s->refused_peer = peer;
        server_log_refused(s, false);
        return;
    }
    while (s->used[CONNECTIONS] >= s->limit[CONNECTIONS] && server_make_way(s, user))
        continue;
    conn_new(s, fd, &peer, user);
}

/* Accepts up to ACCEPT_BURST peers. */
static void listener_ready(struct server *s, struct listener *l) {
    for (int i = 0; i < ACCEPT_BURST; i++) {
        int fd = accept4(l->source.fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            server_admit(s, fd);
        } else if (errno == EAGAIN) {
            return; /* no more peers are waiting */
        } else if (errno == EINVAL) { /* epoll would report it for ever */
            log_line(LOG_ERROR, "msg=\"a listening socket was shut down by another process\" fd=%d", l->source.fd);
            epoll_ctl(s->epoll, EPOLL_CTL_DEL, l->source.fd, NULL);
            return;
        } else if (errno != EINTR && errno != ECONNABORTED) {
            if (i == 0) /* i > 0: perhaps no peer is left, as accept4 takes a descriptor before it looks */
                server_accept_failed(s, errno);
            return;
        }
    }
}

/* Handles the events of a connection, and closes it if it has ended. */
static void conn_ready(struct conn *c, uint32_t events) {
    if (c->closed)
        return;
    if ((events & (EPOLLERR | EPOLLHUP)) && c->writing)
        conn_close(c, "peer is gone");
    else if ((c->writing ? conn_flush(c) : conn_read(c)) < 0)
        conn_close(c, "done");
}

/*
 * Ends the requests of a connection that have passed their deadlines. Returns -1 if the
 * connection itself must be closed.
 */
static int conn_expire(struct conn *c) {
    struct server *s = c->server;
    if (!c->greeted && s->now_ms >= c->preface_deadline_ms)
        return -1;
    if (c->out && s->now_ms >= c->out_deadline_ms)
        return -1;
    bool answered = false;
    for (struct stream *t = c->streams, *next; t; t = next) {
        next = t->next;
        if (s->now_ms < t->deadline_ms) {
            server_due(s, t->deadline_ms);
        } else if (t->state == STREAM_BODY) {
            int rv = t->request.method == METHOD_POST
                         ? stream_fail(t, GRPC_DEADLINE_EXCEEDED, "the request was not complete in time")
                         : stream_reset(t, NGHTTP2_CANCEL);
            if (nghttp2_is_fatal(rv))
                return -1;
            answered = true;
        } else {
            return -1; /* an endless head, or an answer that the peer does not take */
        }
    }
    if (!c->greeted)
        server_due(s, c->preface_deadline_ms);
    if (c->out)
        server_due(s, c->out_deadline_ms);
    traces_log(c, false);
    return answered && !c->writing ? conn_flush(c) : 0;
}

/*
 * Does everything that is due, and computes next_ms anew. next_ms is never later than the
 * next deadline. For this, each function that sets a deadline calls server_due, and the
 * functions called here call it again for each deadline that is still to come.
 */
static void server_expire(struct server *s) {
    if (s->now_ms < s->next_ms)
        return;
    s->next_ms = s->drain_ms;
    if (s->used[STREAMS] == 0 && s->now_ms >= s->active_ms + TIDY_AFTER_MS)
        heap_tidy(&s->heap);
    for (struct conn *c = s->conns; c; c = c->next)
        if (!c->closed && conn_expire(c) < 0)
            conn_close(c, "timed out");
    if (s->now_ms >= s->resume_accept_ms) {
        s->resume_accept_ms = INT64_MAX;
        server_accept_from(s, true);
    }
    server_due(s, s->resume_accept_ms);
    server_log_refused(s, false);
    server_log_left_out(s, false);
}

/*
 * Handles SIGTERM and SIGINT. After the first, nothing new is accepted, and requests that
 * have begun get DRAIN_TIMEOUT_MS. The second ends the loop at once.
 */
static void server_stop(struct server *s, unsigned signal) {
    if (s->drain_ms != INT64_MAX) {
        s->drain_ms = s->now_ms;
        return;
    }
    log_line(LOG_INFO, "msg=stopping signal=%u connections=%zu streams=%zu", signal, s->used[CONNECTIONS],
             s->used[STREAMS]);
    notify(s->notify, "STOPPING=1");
    s->drain_ms = s->now_ms + DRAIN_TIMEOUT_MS;
    s->resume_accept_ms = INT64_MAX;
    server_due(s, s->drain_ms);
    listeners_close(s);
    for (struct conn *c = s->conns; c; c = c->next)
        if (!c->closed && conn_goaway(c) < 0)
            conn_close(c, "drained");
}

/* Reads one signal and handles it. SIGHUP only logs a line. */
static void server_signal(struct server *s) {
    struct signalfd_siginfo info;
    if (read(s->signals.fd, &info, sizeof info) != sizeof info)
        return;
    if (info.ssi_signo == SIGHUP)
        log_line(LOG_INFO, "msg=\"nothing is read again, the KEKs stay as they are: restart to change them\" signal=%u",
                 info.ssi_signo);
    else
        server_stop(s, info.ssi_signo);
}

/*
 * Makes sure that the timer expires at next_ms or earlier. A timer that expires too early
 * costs one empty turn.
 */
static void server_set_timer(struct server *s) {
    if (s->used[STREAMS] == 0 && s->heap.total > s->heap.in_use)
        server_due(s, s->active_ms + TIDY_AFTER_MS);
    if (s->next_ms >= s->timer_ms)
        return;
    const struct itimerspec at = {.it_value = {.tv_sec = s->next_ms / 1000, .tv_nsec = s->next_ms % 1000 * 1000000}};
    if (timerfd_settime(s->timer.fd, TFD_TIMER_ABSTIME, &at, NULL) < 0)
        die("timerfd_settime: %s", strerror(errno));
    s->timer_ms = s->next_ms;
}

/* The timer has expired, and server_expire will look for the cause. */
static void server_timer(struct server *s) {
    uint64_t times;
    if (read(s->timer.fd, &times, sizeof times) == sizeof times)
        s->timer_ms = INT64_MAX;
}

/* Removes everything that a turn has made, except the bytes that peers are still to receive. */
static void server_turn_end(struct server *s) {
    random_drop(&s->kms.random);
    free(s->page);
    s->page = NULL;
    stack_wipe();
    server_reap(s);
}

/*
 * Serves until a signal stops the server. Then returns as soon as all connections are closed
 * or the drain time is over. Each turn shares TURN_BYTES among the ready descriptors.
 */
static void server_run(struct server *s) {
    struct epoll_event events[EVENTS_MAX];
    while (s->drain_ms == INT64_MAX || (s->used[CONNECTIONS] > 0 && s->now_ms < s->drain_ms)) {
        server_set_timer(s);
        int n = epoll_pwait(s->epoll, events, EVENTS_MAX, -1, NULL);
        if (n < 0 && errno != EINTR)
            die("epoll_pwait: %s", strerror(errno));
        server_clock(s);
        s->share = n > TURN_BYTES / IN_BYTES ? (size_t)(TURN_BYTES / n) : IN_BYTES;
        for (int i = 0; i < n; i++) {
            struct source *source = events[i].data.ptr;
            if (source->kind == SOURCE_TIMER)
                server_timer(s);
            else
                s->active_ms = s->now_ms;
            if (source->kind == SOURCE_CONN)
                conn_ready((struct conn *)source, events[i].events);
            else if (source->kind == SOURCE_LISTENER && s->drain_ms == INT64_MAX)
                listener_ready(s, (struct listener *)source);
            else if (source->kind == SOURCE_SIGNAL)
                server_signal(s);
        }
        server_expire(s);
        server_turn_end(s);
    }
}

/*
 * The number of connections that the limit of descriptors permits, at most `wanted`. Raises
 * the limit if it is too low, as far as the system allows.
 */
static size_t server_capacity(size_t wanted) {
    struct rlimit files;
    rlim_t need = wanted + RESERVED_FILES;
    if (getrlimit(RLIMIT_NOFILE, &files) < 0 || files.rlim_cur >= need)
        return wanted;
    files.rlim_cur = files.rlim_max < need ? files.rlim_max : need;
    prlimit(0, RLIMIT_NOFILE, &files, NULL); /* musl's setrlimit is 2 KB of code for threads */
    if (getrlimit(RLIMIT_NOFILE, &files) < 0 || files.rlim_cur >= need)
        return wanted;
    size_t fit = files.rlim_cur > RESERVED_FILES ? (size_t)files.rlim_cur - RESERVED_FILES : 1;
    log_line(LOG_WARN, "msg=\"the descriptor limit allows fewer connections\" wanted=%zu connections=%zu", wanted, fit);
    return fit;
}

/* Makes epoll report when a descriptor can be read. Dies if that fails. */
static void server_watch(struct server *s, struct source *source) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = source};
    if (epoll_ctl(s->epoll, EPOLL_CTL_ADD, source->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

/*
 * Handles SIGTERM and SIGINT before the server runs: they end the start at once. Process 1 of
 * a container needs this handler, because by default these signals do not end it.
 */
static void on_early_signal(int signal) {
    (void)signal;
    _exit(0);
}

/*
 * Blocks all signals until signals_open, except SIGTERM, SIGINT, and the three that stop a
 * job of a terminal (SIGTSTP, SIGTTIN, SIGTTOU). Resets the actions for SIGCHLD and SIGALRM.
 */
static void signals_hold(void) {
    sigset_t set;
    static const int free[] = {SIGTSTP, SIGTTIN, SIGTTOU, SIGTERM, SIGINT};
    const struct sigaction end = {.sa_handler = on_early_signal}, usual = {.sa_handler = SIG_DFL};
    const uint64_t threads = 7ULL << 31; /* 32 to 34, which libcs keep for threads and leave out of every set */
    sigfillset(&set);
    for (size_t i = 0; i < sizeof free / sizeof *free; i++)
        sigdelset(&set, free[i]);
    if (sigprocmask(SIG_SETMASK, &set, NULL) < 0 || sigaction(SIGTERM, &end, NULL) < 0 || sigaction(SIGINT, &end, NULL) < 0)
        die("sigprocmask, sigaction: %s", strerror(errno));
    syscall(SYS_rt_sigprocmask, SIG_BLOCK, &threads, NULL, sizeof threads);
    sigaction(SIGCHLD, &usual, NULL); /* a parent may have ignored these: waitpid and alarm fail then */
    sigaction(SIGALRM, &usual, NULL);
}

/*
 * Makes a descriptor that reports SIGTERM, SIGINT and SIGHUP. It must exist before the first
 * socket file, because on_early_signal would leave the file behind. All other signals that
 * can be blocked stay blocked, except the three that stop a job of a terminal.
 */
static int signals_open(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        die("signalfd: %s", strerror(errno));
    sigprocmask(SIG_BLOCK, &set, NULL);
    return fd;
}

/* Makes a server without sockets, and gives it the ring. Dies if something is missing. */
static struct server *server_new(struct ring *ring, const struct serve_options *options) {
    struct server *s = calloc(1, sizeof *s);
    if (!s || kms_init(&s->kms, ring) < 0 || sessions_init(s) < 0)
        die("out of memory");
    s->options = options;
    s->limit[CONNECTIONS] = server_capacity(options->max_connections);
    s->limit[STREAMS] = ALL_STREAMS_MAX;
    s->limit[BUFFERED] = BUFFERED_MAX;
    s->limit[HELD] = HEAP_MAX;
    for (; s->user_count < options->uid_count; s->user_count++)
        s->users[s->user_count].uid = options->uids[s->user_count];
    s->next_ms = s->timer_ms = s->resume_accept_ms = s->drain_ms = INT64_MAX;
    s->refused_logged_ms = -REFUSED_LOG_MS;
    s->minute_ms = -MINUTE_MS;
    s->share = IN_BYTES;
    metrics_init(&s->metrics);
    server_clock(s);
    s->notify = -1;
    s->signals = (struct source){SOURCE_SIGNAL, signals_open()};
    s->timer = (struct source){SOURCE_TIMER, timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)};
    if (s->timer.fd < 0)
        die("timerfd_create: %s", strerror(errno));
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (s->epoll < 0)
        die("epoll_create1: %s", strerror(errno));
    server_watch(s, &s->signals);
    server_watch(s, &s->timer);
    return s;
}

/* Closes and frees everything that a server owns, and wipes its secrets. */
static void server_free(struct server *s) {
    for (struct conn *c = s->conns; c; c = c->next)
        conn_close(c, "the end");
    server_log_refused(s, true);
    server_log_left_out(s, true);
    server_turn_end(s);
    nghttp2_session_callbacks_del(s->callbacks);
    nghttp2_option_del(s->session_options);
    heap_tidy(&s->heap);
    arena_reset(&s->kms.arena);
    munmap(s->kms.arena.base, ARENA_BYTES);
    ring_free(s->kms.ring);
    if (s->metrics.statm >= 0)
        close(s->metrics.statm);
    if (s->notify >= 0)
        close(s->notify);
    close(s->epoll);
    close(s->timer.fd);
    close(s->signals.fd);
    wipe(s, sizeof *s);
    free(s);
    stack_wipe();
}

/* ------------------------------------------------------------- Confinement
 *
 * Confinement limits the damage if an attacker takes over the process. When all files and
 * sockets are open, the process gives up its capabilities, the chance to gain new privileges,
 * and most system calls (seccomp(2)).
 *
 * The kernel runs a filter before each system call. The filter is a small program (BPF) that
 * looks at the number and the arguments of the call, and returns an action:
 *
 *     calls that a turn needs      are allowed
 *     calls useful to an attacker  kill the process: they start a program or a process, open a
 *                                  socket or a file, make memory executable, change the user
 *                                  or the kernel, or belong to another architecture
 *     any other call               fails with ENOSYS, the error of a kernel without the call
 *
 * A call of the last kind gives an attacker nothing, and a libc that tries it can do without.
 *
 * The filter cannot stop the use of the KEKs by code within the process, nor the use of
 * connections that are already open.
 */

#if defined(__x86_64__)
#define THIS_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define THIS_ARCH AUDIT_ARCH_AARCH64
#elif defined(__arm__)
#define THIS_ARCH AUDIT_ARCH_ARM
#elif defined(__riscv) && __riscv_xlen == 64
#define THIS_ARCH AUDIT_ARCH_RISCV64
#else
#define THIS_ARCH 0 /* i386 and s390x pass mmap's arguments in memory, where a filter cannot look: no seccomp */
#endif

/*
 * 32-bit machines have old and new calls; the new ones have 64-bit times and offsets. A libc
 * may try one after the other, so the filter must know both.
 */
#ifdef SYS_mmap2
#define SYS_MMAP SYS_mmap2
#else
#define SYS_MMAP SYS_mmap
#endif

/*
 * A filter under construction. It lives on the stack of seccomp_install, and 512 instructions
 * are more than enough for the lists below.
 */
struct filter {
    struct sock_filter code[512];
    unsigned short len;
};

/* Adds one instruction. if_true and if_false are the numbers of instructions to skip. */
static void filter_add(struct filter *f, uint16_t code, uint8_t if_true, uint8_t if_false, uint32_t k) {
    f->code[f->len++] = (struct sock_filter){code, if_true, if_false, k};
}

/* Adds: load 32 bits of the call's description (struct seccomp_data) from this offset. */
static void filter_load(struct filter *f, size_t offset) {
    filter_add(f, BPF_LD | BPF_W | BPF_ABS, 0, 0, (uint32_t)offset);
}

/* Adds: end the filter with this action. */
static void filter_return(struct filter *f, uint32_t action) {
    filter_add(f, BPF_RET | BPF_K, 0, 0, action);
}

/* Adds: end the filter with this action if the call is in the list. */
static void filter_calls(struct filter *f, const int *calls, size_t count, uint32_t action) {
    for (size_t i = 0; i < count; i++) {
        filter_add(f, BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (uint32_t)calls[i]);
        filter_return(f, action);
    }
}

/*
 * Adds a rule for mmap or mprotect: allow the call, unless its third argument has PROT_EXEC.
 * The argument has 64 bits, and the byte order tells whether its low half is the first or the
 * second.
 */
static void filter_memory(struct filter *f, int call, uint32_t deadly) {
    const size_t low = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 0 : 4;
    filter_add(f, BPF_JMP | BPF_JEQ | BPF_K, 0, 4, (uint32_t)call);
    filter_load(f, offsetof(struct seccomp_data, args[2]) + low);
    filter_add(f, BPF_JMP | BPF_JSET | BPF_K, 0, 1, PROT_EXEC);
    filter_return(f, deadly);
    filter_return(f, SECCOMP_RET_ALLOW);
}

/*
 * Allows the calls of a turn, of a log line and of the exit, with each libc and on each
 * machine. Frequent ones come first.
 */
static void filter_allow(struct filter *f) {
    const int calls[] = {
        SYS_epoll_pwait, SYS_read, SYS_write, SYS_getrandom, SYS_epoll_ctl, SYS_accept4, SYS_getsockopt, SYS_close,
        SYS_madvise, SYS_munmap, SYS_brk, SYS_exit_group, SYS_exit, SYS_unlinkat,
        SYS_pread64, /* metrics_resident */
#ifdef SYS_clock_gettime /* used when the vDSO has no clock */
        SYS_clock_gettime,
#endif
#ifdef SYS_clock_gettime32
        SYS_clock_gettime32,
#endif
#ifdef SYS_clock_gettime64
        SYS_clock_gettime64,
#endif
#ifdef SYS_timerfd_settime
        SYS_timerfd_settime,
#endif
#ifdef SYS_timerfd_settime32
        SYS_timerfd_settime32,
#endif
#ifdef SYS_timerfd_settime64
        SYS_timerfd_settime64,
#endif
#ifdef SYS_ppoll /* log_line */
        SYS_ppoll,
#endif
#ifdef SYS_ppoll_time64
        SYS_ppoll_time64,
#endif
#ifdef SYS_lstat /* listener_close */
        SYS_lstat,
#endif
#ifdef SYS_lstat64
        SYS_lstat64,
#endif
#ifdef SYS_newfstatat
        SYS_newfstatat,
#endif
#ifdef SYS_fstatat64
        SYS_fstatat64,
#endif
#ifdef SYS_statx
        SYS_statx,
#endif
    };
    filter_calls(f, calls, sizeof calls / sizeof *calls, SECCOMP_RET_ALLOW);
}

/* Kills the process for calls that give an attacker something that the process does not have. */
static void filter_kill(struct filter *f, uint32_t deadly) {
    const int calls[] = {
        /* programs and processes */
        SYS_execve, SYS_execveat, SYS_clone, SYS_ptrace, SYS_process_vm_readv, SYS_process_vm_writev, SYS_kill, SYS_tkill,
        SYS_tgkill, SYS_rt_sigqueueinfo, SYS_rt_tgsigqueueinfo, SYS_unshare, SYS_setns, SYS_kcmp,
#ifdef SYS_fork
        SYS_fork, SYS_vfork,
#endif
#ifdef SYS_clone3
        SYS_clone3,
#endif
#ifdef SYS_pidfd_getfd
        SYS_pidfd_open, SYS_pidfd_getfd, SYS_pidfd_send_signal,
#endif
#ifdef SYS_process_madvise
        SYS_process_madvise,
#endif
        /* sockets */
        SYS_socket, SYS_socketpair, SYS_connect, SYS_bind, SYS_listen, SYS_sendto, SYS_sendmsg, SYS_sendmmsg, SYS_recvmsg,
        SYS_recvmmsg,
        /* files */
        SYS_openat, SYS_open_by_handle_at, SYS_memfd_create, SYS_linkat, SYS_symlinkat, SYS_mkdirat, SYS_mknodat,
        SYS_renameat2, SYS_fchmod, SYS_fchmodat, SYS_fchown, SYS_fchownat, SYS_truncate, SYS_ftruncate, SYS_chroot,
        SYS_pivot_root, SYS_mount, SYS_umount2, SYS_setxattr, SYS_fsetxattr, SYS_lsetxattr,
#ifdef SYS_renameat
        SYS_renameat,
#endif
#ifdef SYS_open
        SYS_open, SYS_creat, SYS_link, SYS_symlink, SYS_unlink, SYS_rename, SYS_mkdir, SYS_rmdir, SYS_mknod, SYS_chmod,
        SYS_chown, SYS_lchown,
#endif
#ifdef SYS_openat2
        SYS_openat2,
#endif
#ifdef SYS_open_tree
        SYS_open_tree, SYS_move_mount, SYS_fsopen, SYS_fsmount,
#endif
        /* executable memory: see filter_memory for mmap and mprotect */
        SYS_shmat, SYS_remap_file_pages, SYS_personality,
#ifdef SYS_pkey_mprotect
        SYS_pkey_mprotect,
#endif
#ifdef SYS_userfaultfd
        SYS_userfaultfd,
#endif
        /* changes of user, group and capabilities */
        SYS_setuid, SYS_setgid, SYS_setreuid, SYS_setregid, SYS_setresuid, SYS_setresgid, SYS_setgroups, SYS_setfsuid,
        SYS_setfsgid, SYS_capset,
#ifdef SYS_setuid32
        SYS_setuid32, SYS_setgid32, SYS_setreuid32, SYS_setregid32, SYS_setresuid32, SYS_setresgid32, SYS_setgroups32,
        SYS_setfsuid32, SYS_setfsgid32,
#endif
        /* the kernel itself */
        SYS_bpf, SYS_perf_event_open, SYS_add_key, SYS_request_key, SYS_keyctl, SYS_init_module, SYS_finit_module,
        SYS_delete_module, SYS_kexec_load, SYS_reboot,
#ifdef SYS_kexec_file_load
        SYS_kexec_file_load,
#endif
#ifdef SYS_iopl
        SYS_iopl, SYS_ioperm, SYS_modify_ldt,
#endif
#ifdef SYS_io_uring_setup
        SYS_io_uring_setup, SYS_io_uring_enter, SYS_io_uring_register,
#endif
    };
    filter_calls(f, calls, sizeof calls / sizeof *calls, deadly);
}

/*
 * Installs the filter. `deadly` is the action for an attacker's calls, `other` the action for
 * calls in neither list. Returns 0, or -1 with errno.
 */
static int seccomp_install(uint32_t deadly, uint32_t other) {
    if (THIS_ARCH == 0) {
        errno = ENOSYS;
        return -1;
    }
    struct filter f = {.len = 0};
    filter_load(&f, offsetof(struct seccomp_data, arch));
    filter_add(&f, BPF_JMP | BPF_JEQ | BPF_K, 1, 0, THIS_ARCH);
    filter_return(&f, deadly);
    filter_load(&f, offsetof(struct seccomp_data, nr));
#ifdef __x86_64__
    enum { X32 = 0x40000000 }; /* the calls of x32 have x86-64's numbers with this bit set */
    filter_add(&f, BPF_JMP | BPF_JGE | BPF_K, 0, 1, X32);
    filter_return(&f, deadly);
#endif
    filter_allow(&f);
    filter_kill(&f, deadly);
    filter_memory(&f, SYS_MMAP, deadly);
    filter_memory(&f, SYS_mprotect, deadly);
    filter_return(&f, other);
    const struct sock_fprog program = {.len = f.len, .filter = f.code};
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

/*
 * Gives up every capability. Returns 0, or -1 with errno. The bounding set stays, because an
 * attacker cannot use it: privileges_freeze keeps execve from regaining a capability, and the
 * filter kills the process for an execve.
 */
static int capabilities_drop(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[_LINUX_CAPABILITY_U32S_3] = {0};
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); /* Linux before 4.3 does not know it */
    return (int)syscall(SYS_capset, &header, none);
}

/* Keeps this process and its children from gaining privileges by execve. Returns 0, or -1 with errno. */
static int privileges_freeze(void) {
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
}

/* Installs the filter for serving. Returns 0, or -1 with errno. */
static int seccomp_enforce(void) {
    return seccomp_install(SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO | ENOSYS);
}

/*
 * Confines the process, without seccomp if `filtered` is false. Returns NULL, or the feature
 * that --sandbox require demands and this machine lacks, with errno set.
 */
static const char *confine(enum sandbox sandbox, bool filtered) {
    static const struct {
        const char *feature;
        int (*step)(void);
    } steps[] = {
        {"no_new_privs", privileges_freeze},
        {"capabilities", capabilities_drop},
        {"seccomp", seccomp_enforce},
    };
    if (sandbox == SANDBOX_OFF)
        return NULL;
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        if ((steps[i].step == seccomp_enforce && !filtered) || steps[i].step() == 0)
            continue;
        if (sandbox == SANDBOX_REQUIRE)
            return steps[i].feature;
        log_line(LOG_WARN, "msg=\"the sandbox lacks a feature\" feature=%s error=%s", steps[i].feature,
                 strerror(errno));
    }
    return NULL;
}

/* ------------------------------------------------------------------- Probe
 *
 * A gRPC client that calls every RPC on a real socket, as kube-apiserver does. It needs no
 * key and no other program, so it can be a container's exec probe in an image without a
 * shell.
 *
 * `struct client` and the functions client_... are a small gRPC client. It has one connection
 * and one request at a time, and waits for each answer. The functions probe_... are the steps
 * of a probe: they encrypt a random secret, decrypt the result, and compare.
 *
 * The probe checks that a plugin works. It cannot check whether the plugin keeps its KEK
 * secret.
 */

/* One call of an RPC. It borrows its request. The server's strings are cut to the sizes below. */
struct call {
    const uint8_t *request; /* with gRPC prefix */
    size_t request_len, request_sent;
    uint8_t response[GRPC_PREFIX_BYTES + MESSAGE_MAX]; /* with gRPC prefix */
    size_t response_len;
    char http_status[4], status[4], message[MESSAGE_TEXT_MAX + 1];
    bool closed; /* the stream has ended */
};

/*
 * A connection to a plugin. It owns the descriptor and the session. probe() closes both, or
 * the end of the program does.
 */
struct client {
    int fd;
    nghttp2_session *session;
    int64_t deadline_ms;
    bool heard; /* some bytes have come from the server */
    struct call call; /* the present call */
    char why[LOG_LINE_MAX]; /* reason of the last failure */
};

/* Sets the reason of a failure, and returns -1. */
__attribute__((format(printf, 2, 3)))
static int client_fail(struct client *c, const char *format, ...) {
    struct text t = {.buf = c->why, .cap = sizeof c->why - 1};
    va_list args;
    va_start(args, format);
    text_vadd(&t, format, args);
    va_end(args);
    c->why[t.len] = '\0';
    return -1;
}

/* nghttp2's callback for the body of the request. Copies the next piece to `buf`, and returns its length. */
static ssize_t client_read_request(nghttp2_session *session, int32_t id, uint8_t *buf, size_t len, uint32_t *flags,
                                   nghttp2_data_source *source, void *client) {
    (void)session;
    (void)id;
    (void)client;
    struct call *call = source->ptr;
    size_t left = call->request_len - call->request_sent;
    if (left <= len)
        *flags |= NGHTTP2_DATA_FLAG_EOF;
    else
        left = len;
    memcpy(buf, call->request + call->request_sent, left);
    call->request_sent += left;
    return (ssize_t)left;
}

/* Keeps the three fields of a response that matter: HTTP status, gRPC status, and message. */
static int client_on_header(nghttp2_session *session, const nghttp2_frame *frame, const uint8_t *name, size_t name_len,
                            const uint8_t *value, size_t len, uint8_t flags, void *client) {
    (void)session;
    (void)frame;
    (void)flags;
    struct call *call = &((struct client *)client)->call;
    if (IS(name, name_len, ":status"))
        copy_text(call->http_status, sizeof call->http_status, value, len);
    else if (IS(name, name_len, "grpc-status"))
        copy_text(call->status, sizeof call->status, value, len);
    else if (IS(name, name_len, "grpc-message"))
        copy_text(call->message, sizeof call->message, value, len);
    return 0;
}

/* Keeps a piece of the response. If the response is too long, the session ends. */
static int client_on_data_chunk_recv(nghttp2_session *session, uint8_t flags, int32_t id, const uint8_t *data,
                                     size_t len, void *client) {
    (void)flags;
    struct call *call = &((struct client *)client)->call;
    if (len > sizeof call->response - call->response_len)
        return NGHTTP2_ERR_CALLBACK_FAILURE;
    memcpy(call->response + call->response_len, data, len);
    call->response_len += len;
    return nghttp2_session_consume(session, id, len);
}

static int client_on_stream_close(nghttp2_session *session, int32_t id, uint32_t error, void *client) {
    (void)session;
    (void)id;
    (void)error;
    ((struct client *)client)->call.closed = true;
    return 0;
}

/*
 * Reports that the connection is lost: the system call `call` has failed with `error`, or the
 * server has closed the connection if `error` is 0. Returns -1.
 */
static int client_lost(struct client *c, const char *call, int error) {
    if (!c->heard && (error == 0 || error == EPIPE || error == ECONNRESET))
        return client_fail(c, "the server closed the connection without a word, as it does to a uid that it does not allow: "
                           "ours is %u; its log says msg=refused then, and serve --allow-uid lets others in", geteuid());
    return error == 0 ? client_fail(c, "the server closed the connection")
                      : client_fail(c, "%s: %s", call, strerror(error));
}

/* Waits until the socket can be read or written. Returns 0, or -1 when the time is over. */
static int client_wait(struct client *c, short events) {
    struct pollfd p = {.fd = c->fd, .events = events};
    int64_t left = c->deadline_ms - monotonic_us() / 1000;
    const struct timespec wait = {.tv_sec = left / 1000, .tv_nsec = left % 1000 * 1000000};
    int n = left > 0 ? ppoll(&p, 1, &wait, NULL) : 0;
    if (n < 0 && errno != EINTR)
        return client_fail(c, "ppoll: %s", strerror(errno));
    return n != 0 ? 0 : client_fail(c, "no answer in time");
}

/* Connects, and starts a session. Returns 0, or -1 with a reason in c->why. */
static int client_open(struct client *c, const struct sockaddr_un *address, socklen_t len) {
    static const nghttp2_settings_entry settings[] = {
        {NGHTTP2_SETTINGS_ENABLE_PUSH, 0},
        {NGHTTP2_SETTINGS_NO_RFC7540_PRIORITIES, 1},
    };
    nghttp2_session_callbacks *callbacks;
    nghttp2_option *options;
    c->fd = socket_new();
    while (connect(c->fd, (const struct sockaddr *)address, len) < 0) {
        if (errno != EAGAIN)
            return client_fail(c, "connect: %s", strerror(errno));
        const struct timespec wait = {.tv_nsec = 1000000}; /* the server's queue is full */
        if (monotonic_us() / 1000 >= c->deadline_ms || nanosleep(&wait, NULL) < 0)
            return client_fail(c, "connect: no answer in time");
    }
    if (nghttp2_session_callbacks_new(&callbacks) != 0 || !(options = session_options_new()))
        return client_fail(c, "out of memory");
    nghttp2_session_callbacks_set_on_header_callback(callbacks, client_on_header);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(callbacks, client_on_data_chunk_recv);
    nghttp2_session_callbacks_set_on_stream_close_callback(callbacks, client_on_stream_close);
    int rv = nghttp2_session_client_new2(&c->session, callbacks, c, options);
    nghttp2_session_callbacks_del(callbacks);
    nghttp2_option_del(options);
    const size_t count = sizeof settings / sizeof *settings;
    if (rv != 0 || nghttp2_submit_settings(c->session, NGHTTP2_FLAG_NONE, settings, count) != 0)
        return client_fail(c, "out of memory");
    return 0;
}

/* Sends and receives until the call's stream has ended. Returns 0, or -1 with a reason. */
static int client_run(struct client *c) {
    static uint8_t in[IN_BYTES];
    while (!c->call.closed) {
        const uint8_t *out;
        ssize_t n = nghttp2_session_mem_send(c->session, &out);
        for (ssize_t sent = 0; n > 0 && sent < n;) {
            ssize_t m = write(c->fd, out + sent, (size_t)(n - sent));
            if (m < 0 && errno != EAGAIN && errno != EINTR)
                return client_lost(c, "write", errno);
            if (m < 0 && client_wait(c, POLLOUT) < 0)
                return -1;
            sent += m > 0 ? m : 0;
        }
        if (n > 0)
            continue;
        if (n < 0)
            return client_fail(c, "out of memory");
        if (!nghttp2_session_want_read(c->session))
            return client_fail(c, "the server does not speak HTTP/2");
        if (client_wait(c, POLLIN) < 0)
            return -1;
        n = read(c->fd, in, sizeof in);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        if (n <= 0)
            return client_lost(c, "read", n < 0 ? errno : 0);
        c->heard = true;
        ssize_t used = nghttp2_session_mem_recv(c->session, in, (size_t)n);
        if (used < 0)
            return client_fail(c, "the answer is not as it should be (nghttp2: %d)", (int)used);
    }
    return 0;
}

/*
 * Calls an RPC. Returns its response, which the caller frees with
 * protobuf_c_message_free_unpacked, or NULL with a reason in c->why.
 */
static void *client_call(struct client *c, enum rpc rpc, const void *request, const ProtobufCMessageDescriptor *type) {
    struct call *call = &c->call;
    static uint8_t bytes[GRPC_PREFIX_BYTES + 2 * MESSAGE_MAX]; /* a request may contain a whole response, and a uid */
    nghttp2_nv fields[] = {FIELD(":method", "POST"), FIELD(":scheme", "http"),
                           field_copied(":path", rpcs[rpc].path, rpcs[rpc].path_len),
                           FIELD(":authority", "localhost"), FIELD("content-type", "application/grpc"),
                           FIELD("te", "trailers"), FIELD("user-agent", "kmsplugin/" VERSION)};
    nghttp2_data_provider body = {.source.ptr = call, .read_callback = client_read_request};
    memset(call, 0, sizeof *call);
    size_t len = protobuf_c_message_pack(request, bytes + GRPC_PREFIX_BYTES);
    if (len > MESSAGE_MAX) {
        client_fail(c, "the request would be over %d bytes", MESSAGE_MAX);
        return NULL;
    }
    grpc_prefix_write(bytes, len);
    call->request = bytes;
    call->request_len = GRPC_PREFIX_BYTES + len;
    if (nghttp2_submit_request(c->session, NULL, fields, sizeof fields / sizeof *fields, &body, NULL) < 0) {
        client_fail(c, "out of memory");
        return NULL;
    }
    if (client_run(c) < 0)
        return NULL;
    const char *http_status = call->http_status[0] ? call->http_status : "none";
    if (strcmp(call->status, "0") != 0 || strcmp(http_status, "200") != 0) {
        if (strcmp(http_status, "200") != 0)
            client_fail(c, "HTTP status %s", http_status);
        else if (call->status[0])
            client_fail(c, "%s: %s", grpc_code_name((unsigned)decimal(call->status, GRPC_CODES)), call->message);
        else
            client_fail(c, "no grpc-status");
        return NULL;
    }
    const uint8_t *p = call->response;
    if (call->response_len < GRPC_PREFIX_BYTES || p[0] != 0 ||
        grpc_prefix_len(p) != call->response_len - GRPC_PREFIX_BYTES) {
        client_fail(c, "the response is no single gRPC message");
        return NULL;
    }
    void *response = protobuf_c_message_unpack(type, NULL, grpc_prefix_len(p), p + GRPC_PREFIX_BYTES);
    if (!response)
        client_fail(c, "the response is not a valid protobuf message");
    return response;
}

/*
 * The client, and the values that one step of a probe passes to the next. It is static, so it
 * begins as zeros.
 */
struct probe {
    struct client client;
    uint8_t secret[KEK_BYTES];
    char key_id[V2_CIPHERTEXT_MAX + 1], version[LOG_VALUE_MAX + 1];
    uint8_t sealed[MESSAGE_MAX];
    size_t sealed_len;
};

/* Keeps a ciphertext for the next step. Returns 0, or -1 with a reason. */
static int probe_keep(struct probe *p, ProtobufCBinaryData sealed) {
    if (sealed.len == 0 || sealed.len > sizeof p->sealed)
        return client_fail(&p->client, "a ciphertext of %zu bytes", sealed.len);
    memcpy(p->sealed, sealed.data, sealed.len);
    p->sealed_len = sealed.len;
    return 0;
}

/* Compares a decrypted secret with the original. Returns 0, or -1 with a reason. */
static int probe_compare(struct probe *p, ProtobufCBinaryData opened) {
    if (opened.len != sizeof p->secret || memcmp(opened.data, p->secret, opened.len) != 0)
        return client_fail(&p->client, "what was encrypted does not decrypt to the same bytes");
    return 0;
}

/* The steps. Each calls one RPC and checks its response. Each returns 0, or -1 with a reason. */
static int probe_v2_status(struct probe *p) {
    V2__StatusRequest request = V2__STATUS_REQUEST__INIT;
    V2__StatusResponse *r = client_call(&p->client, V2_STATUS, &request, &v2__status_response__descriptor);
    if (!r)
        return -1;
    int rv = 0;
    size_t len = strlen(r->key_id);
    if (strcmp(r->version, "v2") != 0 || strcmp(r->healthz, "ok") != 0)
        rv = client_fail(&p->client, "version %s, healthz %s", r->version, r->healthz);
    else if (len == 0 || len >= sizeof p->key_id)
        rv = client_fail(&p->client, "a key_id of %zu bytes", len);
    else
        memcpy(p->key_id, r->key_id, len + 1);
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return rv;
}

static int probe_v2_encrypt(struct probe *p) {
    V2__EncryptRequest request = V2__ENCRYPT_REQUEST__INIT;
    request.plaintext = (ProtobufCBinaryData){sizeof p->secret, p->secret};
    request.uid = (char *)"kmsplugin-probe";
    V2__EncryptResponse *r = client_call(&p->client, V2_ENCRYPT, &request, &v2__encrypt_response__descriptor);
    if (!r)
        return -1;
    int rv = strcmp(r->key_id, p->key_id) == 0 ? probe_keep(p, r->ciphertext)
                                              : client_fail(&p->client, "another key_id than Status: %s", r->key_id);
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return rv;
}

static int probe_v2_decrypt(struct probe *p) {
    V2__DecryptRequest request = V2__DECRYPT_REQUEST__INIT;
    request.ciphertext = (ProtobufCBinaryData){p->sealed_len, p->sealed};
    request.uid = (char *)"kmsplugin-probe";
    request.key_id = p->key_id;
    V2__DecryptResponse *r = client_call(&p->client, V2_DECRYPT, &request, &v2__decrypt_response__descriptor);
    if (!r)
        return -1;
    int rv = probe_compare(p, r->plaintext);
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return rv;
}

static int probe_v1_version(struct probe *p) {
    V2__V1beta1__VersionRequest request = V2__V1BETA1__VERSION_REQUEST__INIT;
    request.version = (char *)"v1beta1";
    const ProtobufCMessageDescriptor *type = &v2__v1beta1__version_response__descriptor;
    V2__V1beta1__VersionResponse *r = client_call(&p->client, V1_VERSION, &request, type);
    if (!r)
        return -1;
    int rv = strcmp(r->version, "v1beta1") == 0 ? 0 : client_fail(&p->client, "version %s", r->version);
    copy_text(p->version, sizeof p->version, (uint8_t *)r->runtime_version, strlen(r->runtime_version));
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return rv;
}

static int probe_v1_encrypt(struct probe *p) {
    V2__V1beta1__EncryptRequest request = V2__V1BETA1__ENCRYPT_REQUEST__INIT;
    request.version = (char *)"v1beta1";
    request.plain = (ProtobufCBinaryData){sizeof p->secret, p->secret};
    const ProtobufCMessageDescriptor *type = &v2__v1beta1__encrypt_response__descriptor;
    V2__V1beta1__EncryptResponse *r = client_call(&p->client, V1_ENCRYPT, &request, type);
    if (!r)
        return -1;
    int rv = probe_keep(p, r->cipher);
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return rv;
}

static int probe_v1_decrypt(struct probe *p) {
    V2__V1beta1__DecryptRequest request = V2__V1BETA1__DECRYPT_REQUEST__INIT;
    request.version = (char *)"v1beta1";
    request.cipher = (ProtobufCBinaryData){p->sealed_len, p->sealed};
    const ProtobufCMessageDescriptor *type = &v2__v1beta1__decrypt_response__descriptor;
    V2__V1beta1__DecryptResponse *r = client_call(&p->client, V1_DECRYPT, &request, type);
    if (!r)
        return -1;
    int rv = probe_compare(p, r->plain);
    protobuf_c_message_free_unpacked(&r->base, NULL);
    return rv;
}

/* Prints the server's key_id and version. Both are the server's words, so they are escaped. */
static void probe_tell(const struct probe *p) {
    char line[4 * (sizeof p->key_id + sizeof p->version)];
    struct text t = {.buf = line, .cap = sizeof line};
    text_add(&t, "key_id ");
    text_escaped(&t, p->key_id, strlen(p->key_id));
    text_add(&t, " version ");
    text_escaped(&t, p->version, strlen(p->version));
    print(STDOUT_FILENO, "%.*s\n", (int)t.len, line);
}

/*
 * Probes an endpoint. Prints one line for each step, and after the last step the key_id and
 * version of the server. Dies with exit status 1 if a step fails. Also dies if the server's
 * key_id is not expected_key_id, unless that is NULL.
 */
static int probe(const char *endpoint, int64_t timeout_ms, const char *expected_key_id) {
    static const struct {
        const char *name;
        int (*step)(struct probe *);
    } steps[] = {
        {"v2 Status", probe_v2_status},   {"v2 Encrypt", probe_v2_encrypt}, {"v2 Decrypt", probe_v2_decrypt},
        {"v1 Version", probe_v1_version}, {"v1 Encrypt", probe_v1_encrypt}, {"v1 Decrypt", probe_v1_decrypt},
    };
    static struct probe p;
    struct sockaddr_un address;
    socklen_t len;
    endpoint_require(endpoint, &address, &len);
    if (random_fill(p.secret, sizeof p.secret) < 0)
        die("getrandom: %s", strerror(errno));
    sigpipe_block();
    p.client.deadline_ms = monotonic_us() / 1000 + timeout_ms;
    int64_t before = monotonic_us();
    if (client_open(&p.client, &address, len) < 0)
        die("probe %s: %s", endpoint, p.client.why);
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        int rv = steps[i].step(&p);
        int64_t now = monotonic_us();
        unsigned us = (unsigned)(now - before);
        before = now;
        print(STDOUT_FILENO, "%s %s %u.%03u ms\n", steps[i].name, rv == 0 ? "ok" : "failed", us / 1000, us % 1000);
        if (rv < 0)
            die("probe %s: %s: %s", endpoint, steps[i].name, p.client.why);
    }
    probe_tell(&p);
    if (expected_key_id && strcmp(p.key_id, expected_key_id) != 0)
        die("probe %s: the server seals under key_id %s, and %s was expected", endpoint, p.key_id, expected_key_id);
    nghttp2_session_del(p.client.session);
    close(p.client.fd);
    return 0;
}

/* --------------------------------------------------------------- Rehearsal
 *
 * A trial run, which tells whether a confined server can work on this machine. Another libc,
 * kernel, emulator or container runtime may make system calls that the filter does not know,
 * or refuse calls that a server needs. The trial finds this before READY=1, while no Secret
 * depends on the server.
 *
 * A forked child confines itself and does everything that a server may have to do. It has no
 * KEK of the real ring. A second child probes it. If both succeed, the process confines
 * itself in the same way.
 *
 * A rehearsal does not test the configured endpoints, uids and KEKs.
 */

/* Results of a rehearsal. RUINED means that it could not take place. */
enum rehearsal { WELL, BADLY, RUINED };

/* Time limits of the children. Their work takes some milliseconds, but the machine may be busy booting. */
enum { REHEARSAL_SECONDS = 30, REHEARSAL_PROBE_MS = 20 * 1000 };

/* The sentence about a call that the filter does not allow. rehearse recognizes its beginning. */
static const char forbidden[] = "system call %d is needed here, and is not one that the filter allows";

/* Handles SIGSYS, by which the filter reports a call in a rehearsal. */
static void on_forbidden_call(int signal, siginfo_t *info, void *context) {
    (void)signal;
    (void)context;
    char line[LOG_VALUE_MAX + sizeof forbidden];
    struct text t = {.buf = line, .cap = sizeof line};
    text_add(&t, "kmsplugin: ");
    text_add(&t, forbidden, info->si_syscall);
    text_char(&t, '\n');
    write_all(STDERR_FILENO, line, t.len); /* complain makes a call more, which may be this one */
    _exit(1);
}

/* Dies if a call has failed. It is for calls whose result the server itself ignores. */
static void must(const char *call, int result) {
    if (result < 0)
        die("%s: %s", call, strerror(errno));
}

/* Does everything that a server may have to do and that a probe does not cause. */
static void server_warm_up(struct server *s) {
    enum { BLOCKS = 8 };
    void *blocks[BLOCKS];
    for (size_t size = HEAP_CLASS0_BYTES; size <= 4 * MESSAGE_MAX; size *= 4) { /* malloc's system calls */
        for (size_t i = 0; i < BLOCKS; i++)
            blocks[i] = malloc(size);
        for (size_t i = 0; i < BLOCKS; i++)
            free(blocks[i]);
    }
    struct text t = {.buf = arena_new(&s->kms.arena, 2 * ARENA_KEEP_BYTES), .cap = METRICS_BYTES};
    metrics_write(&s->metrics, s->kms.ring->keks[0].key_id, 0, s->users, s->user_count, &t);
    must("pread", s->metrics.statm < 0 || metrics_resident(&s->metrics) > 0 ? 0 : -1);
    arena_reset(&s->kms.arena);
    must("mprotect", mprotect(s->kms.arena.base, ARENA_BYTES, PROT_READ | PROT_WRITE));
    must("madvise", madvise(s->kms.arena.base, ARENA_BYTES, MADV_DONTNEED));
    void *page = mmap(NULL, (size_t)getpagesize(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must("mmap", page == MAP_FAILED ? -1 : 0);
    must("munmap", munmap(page, (size_t)getpagesize()));
    must("close", close(STDIN_FILENO));
    must("accept4", accept4(s->epoll, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC) < 0 && errno == ENOTSOCK ? 0 : -1);
    int type;
    socklen_t len = sizeof type;
    must("getsockopt", getsockopt(s->listeners[0].source.fd, SOL_SOCKET, SO_TYPE, &type, &len));
    struct stat st;
    must("lstat", lstat("/", &st));
    file_remove("/", &st); /* as for a socket; "/" stays, because unlinkat without a flag does not remove a directory */
    must("unlinkat", errno == ENOSYS ? -1 : 0);
    clocks_check();
    s->refused_unlogged = 1;
    server_log_refused(s, false);
    server_accept_from(s, false);
    server_accept_from(s, true);
}

/*
 * The child that serves, under a random KEK of its own. `other` is the filter's action for
 * calls in neither list.
 */
static void rehearse_server(const struct serve_options *asked, int listener, bool filtered, uint32_t other) {
    const struct sigaction tell = {.sa_sigaction = on_forbidden_call, .sa_flags = SA_SIGINFO};
    struct serve_options options = *asked;
    uint8_t key[KEK_BYTES];
    sigset_t set;
    options.uids[0] = geteuid();
    options.uid_count = 1;
    log_level = LOG_DEBUG;
    struct ring *ring = ring_new();
    if (random_fill(key, sizeof key) < 0)
        die("getrandom: %s", strerror(errno));
    kek_init(&ring->keks[ring->count++], &ring->suite, key);
    struct server *s = server_new(ring, &options);
    s->listeners[s->listener_count++].source = (struct source){SOURCE_LISTENER, listener};
    sigemptyset(&set);
    sigaddset(&set, SIGSYS);
    if (sigaction(SIGSYS, &tell, NULL) < 0 || sigprocmask(SIG_UNBLOCK, &set, NULL) < 0)
        die("sigaction, sigprocmask: %s", strerror(errno));
    if (filtered) {
        privileges_freeze();
        capabilities_drop();
        if (seccomp_install(SECCOMP_RET_TRAP, other) < 0)
            die("the kernel takes no filter of ours: %s", strerror(errno));
    }
    server_watch(s, &s->listeners[0].source);
    server_warm_up(s);
    server_run(s);
    server_free(s);
}

/*
 * Reads the output of the children to its end. Copies the first sentence of a failed child to
 * `why`, without the program's name.
 */
static void rehearsal_read(int fd, char *why, size_t cap) {
    static const char mark[] = "kmsplugin: ";
    char bytes[LOG_LINE_MAX], line[LOG_LINE_MAX];
    size_t len = 0;
    ssize_t n;
    why[0] = '\0';
    while ((n = read(fd, bytes, sizeof bytes)) > 0) {
        for (ssize_t i = 0; i < n; i++) {
            if (bytes[i] != '\n') {
                if (len < sizeof line)
                    line[len++] = bytes[i];
                continue;
            }
            if (len >= sizeof mark && memcmp(line, mark, sizeof mark - 1) == 0 && !why[0])
                copy_text(why, cap, (uint8_t *)line + sizeof mark - 1, len - (sizeof mark - 1));
            len = 0;
        }
    }
}

/* Waits for a child. Returns its wait status, which is 0 if it ended well, or -1 with errno. */
static int child_wait(pid_t pid) {
    int status = 0;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return -1;
    return status;
}

/*
 * Directs a child's output to `words`, closes what LISTEN_FDS has handed to the parent, and
 * limits the child's lifetime: to that of its parent, and to REHEARSAL_SECONDS.
 */
static void child_begin(pid_t parent, int words, int listener) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    must("sigprocmask", sigprocmask(SIG_UNBLOCK, &set, NULL));
    alarm(REHEARSAL_SECONDS);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(1);
    must("dup2", dup2(words, STDOUT_FILENO));
    must("dup2", dup2(words, STDERR_FILENO));
    for (int fd = FIRST_INHERITED; fd < FIRST_INHERITED + LISTENERS_MAX; fd++)
        if (fd != listener)
            close(fd);
}

/* Like fork(2), but tries again for a second if the limit on processes is reached (EAGAIN). */
static pid_t child_new(void) {
    enum { TRIES = 10 };
    const struct timespec pause = {.tv_nsec = ACCEPT_PAUSE_MS * 1000000L};
    pid_t pid;
    for (int i = 0; (pid = fork()) < 0 && errno == EAGAIN && i < TRIES; i++)
        nanosleep(&pause, NULL);
    return pid;
}

/* Reports that a rehearsal could not take place because `call` has failed with errno. */
static enum rehearsal rehearsal_ruined(const char *call, char *why, size_t cap) {
    struct text t = {.buf = why, .cap = cap - 1};
    text_add(&t, "no rehearsal could be held: %s: %s", call, strerror(errno));
    why[t.len] = '\0';
    return RUINED;
}

/*
 * Opens a listening socket with an abstract name that the kernel chooses, and a pipe. Returns
 * NULL, or the call that failed, with errno set.
 */
static const char *rehearsal_open(int listener, struct sockaddr_un *address, socklen_t *len, int words[2]) {
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    *len = sizeof *address;
    return bind(listener, (struct sockaddr *)address, sizeof address->sun_family) < 0 ? "bind"
           : listen(listener, 1) < 0                                                  ? "listen"
           : getsockname(listener, (struct sockaddr *)address, len) < 0               ? "getsockname"
           : pipe2(words, O_CLOEXEC) < 0                                              ? "pipe2"
                                                                                      : NULL;
}

/* Holds one rehearsal. If the result is not WELL, `why` has the reason. */
static enum rehearsal rehearse(const struct serve_options *options, bool filtered, uint32_t other, char *why, size_t cap) {
    enum rehearsal went = WELL;
    struct sockaddr_un address;
    socklen_t len;
    char endpoint[ENDPOINT_NAME_BYTES];
    int words[2], listener = socket_new();
    const char *lost = rehearsal_open(listener, &address, &len, words);
    if (lost) {
        went = rehearsal_ruined(lost, why, cap);
        close(listener);
        return went;
    }
    const pid_t parent = getpid();
    const int64_t begin_us = monotonic_us();
    pid_t server = child_new();
    if (server == 0) {
        child_begin(parent, words[1], listener);
        rehearse_server(options, listener, filtered, other);
        _exit(0);
    }
    pid_t client = server > 0 ? child_new() : -1;
    if (client == 0) {
        child_begin(parent, words[1], -1);
        _exit(probe(endpoint_name(&address, len, endpoint, sizeof endpoint), REHEARSAL_PROBE_MS, NULL));
    }
    if (client < 0)
        went = rehearsal_ruined("fork", why, cap);
    close(listener);
    close(words[1]);
    int probed = went == WELL ? child_wait(client) : -1, served = -1;
    if (went == WELL && probed < 0)
        went = rehearsal_ruined("waitpid", why, cap);
    if (server > 0 && kill(server, probed == 0 ? SIGTERM : SIGKILL) < 0)
        went = rehearsal_ruined("kill", why, cap); /* its alarm ends it */
    else if (server > 0)
        served = child_wait(server);
    if (went == WELL)
        rehearsal_read(words[0], why, cap);
    close(words[0]);
    if (went != WELL || (probed == 0 && served == 0))
        return went;
    if (monotonic_us() - begin_us > REHEARSAL_PROBE_MS * 1000LL) { /* slow: this tells only the machine's load */
        errno = ETIMEDOUT;
        return rehearsal_ruined("probe", why, cap);
    }
    struct text t = {.buf = why, .cap = cap - 1};
    const size_t start_len = strcspn(forbidden, "%"); /* "system call " */
    bool named = strncmp(why, forbidden, start_len) == 0;
    if (WIFSIGNALED(served) && WTERMSIG(served) == SIGSYS && !named)
        text_add(&t, forbidden, (int)SYS_write); /* without it on_forbidden_call could not report the call */
    else if (!why[0])
        text_add(&t, "a rehearsal did not come to its end");
    if (t.len > 0)
        why[t.len] = '\0';
    return BADLY;
}

/*
 * Whether the server can work here with the filter. Holds up to three rehearsals: with the
 * filter for serving; with one that traps each unknown call, so that the reason names the
 * call; and without a filter. Dies if --sandbox require asks for a filter that does not work
 * here, or if the server cannot work even without the filter.
 */
static bool serve_rehearse(const struct serve_options *options, const struct ring *ring) {
    char why[LOG_LINE_MAX] = "madvise knows no MADV_DONTFORK: a rehearsal would have the KEKs", other[LOG_LINE_MAX];
    enum rehearsal went = RUINED;
    if (options->sandbox != SANDBOX_OFF) {
        if (ring->unforked)
            went = rehearse(options, true, SECCOMP_RET_ERRNO | ENOSYS, why, sizeof why);
        if (went == WELL)
            return true;
        if (went == BADLY && rehearse(options, true, SECCOMP_RET_TRAP, other, sizeof other) == BADLY)
            memcpy(why, other, sizeof why); /* this reason names the call */
        if (options->sandbox == SANDBOX_REQUIRE)
            die("--sandbox require: seccomp: %s", why);
    }
    if (ring->unforked && rehearse(options, false, 0, other, sizeof other) == BADLY)
        die("cannot serve here: %s", other);
    if (options->sandbox != SANDBOX_OFF)
        log_line(LOG_WARN, "msg=\"the sandbox lacks a feature\" feature=seccomp error=%s", why);
    return false;
}

/* ------------------------------------------------------------------ Rescue
 *
 * This section opens values of etcd without an API server. `unseal` opens one value, or all
 * values of an etcd response. `audit` counts the values by KEK, and so tells whether an old
 * KEK may be retired.
 *
 * A value begins with the name of its API and of its provider. The data follows:
 *
 *     k8s:enc:kms:v1:NAME:  sealed DEK length[2] | sealed DEK | object under the DEK
 *     k8s:enc:kms:v2:NAME:  an EncryptedObject (kms.proto), which has a sealed DEK source and
 *                           encrypted data. There are two kinds:
 *       source is a DEK     data = object under the DEK
 *       source is a seed    data = info[32] | object under the DEK HKDF-Expand(seed, info)
 *
 *     object under a DEK    nonce[12] | ciphertext | tag[16]    AES-GCM
 *
 * HKDF-Expand (RFC 5869) derives a key from a seed and a public text. The associated data of
 * AES-GCM is the etcd key. A value therefore does not open under another etcd key.
 *
 * Input comes from operators in an emergency, who often paste something other than a
 * value. input_judge recognizes values and etcd's RangeResponse, and names anything else.
 *
 * No byte of an object is written before its tag has been checked. Nothing here connects to
 * etcd or changes it, and this section does not open values that another plugin has sealed.
 */

#define RESPONSE_SOURCE "what etcdctl get --prefix ... -w protobuf prints"

/* The tags of a RangeResponse's fields: field number << 3 | wire type. */
enum { RANGE_HEADER = 1 << 3 | 2, RANGE_KVS = 2 << 3 | 2, RANGE_MORE = 3 << 3 | 0, RANGE_COUNT = 4 << 3 | 0 };

enum { FIELDS = 5 }; /* the largest field number that matters here */

/*
 * The messages KeyValue and EncryptedObject of kms.proto. Each string has the wire types of
 * the fields 1 to FIELDS, one digit for each field. The enums number the fields that are used.
 */
static const char key_value[] = "20002", encrypted_object[] = "22220";
enum { KV_KEY = 1, KV_VALUE = 5 };
enum { OBJECT_DATA = 1, OBJECT_KEY_ID, OBJECT_SOURCE, OBJECT_ANNOTATIONS, OBJECT_TYPE };

/*
 * Finds the fields 1 to FIELDS of a message, and ignores fields with higher numbers. fields[n]
 * is the last field with number n; if there is none, it is empty and has the number 0. The
 * fields borrow the bytes. Returns 0, or -1 if the bytes are not a message with these wire
 * types.
 */
static int fields_find(struct field fields[FIELDS + 1], const char wire_types[FIELDS + 1], const uint8_t *bytes,
                       size_t len) {
    const uint8_t *end = bytes + len;
    struct field f;
    int more;
    for (size_t i = 0; i <= FIELDS; i++)
        fields[i] = (struct field){.bytes = bytes};
    while ((more = field_next(&bytes, end, &f)) > 0) {
        if (f.number > FIELDS)
            continue;
        if (f.wire_type != (unsigned)(wire_types[f.number - 1] - '0'))
            return -1;
        fields[f.number] = f;
    }
    return more;
}

enum { KMS_PREFIX_LEN = sizeof "k8s:enc:kms:v1:" - 1 };

/* The kinds of input. */
enum input_kind {
    INPUT_OTHER,    /* anything that cannot be used */
    INPUT_PLAIN,    /* an object of Kubernetes, not encrypted */
    INPUT_FOREIGN,  /* a value of another provider than KMS */
    INPUT_V1,       /* a value of KMS v1 */
    INPUT_V2,       /* a value of KMS v2 */
    INPUT_KEY_LINE, /* an etcd key, a newline, and a value of KMS v1 or v2 */
    INPUT_RESPONSE, /* a RangeResponse */
};

/*
 * The verdict on an input. `what` is a constant that completes a sentence which begins with
 * "standard input" or "the value".
 */
struct input {
    enum input_kind kind;
    const char *what;
};

#define FORM(start, kind, what) {start, sizeof start - 1, kind, what}
#define OTHER(start, what) FORM(start, INPUT_OTHER, what)
#define ETCD_JSON "is JSON of etcdctl: ask for -w protobuf in place of -w json"
#define ERROR_TEXT "is an error message: what should have written a value has failed"
#define SQLITE "is a database of SQLite: have rangeresponse.sql read it (deploy/k3s)"
#define COMPRESSED(by) "is compressed by " by ": decompress it first"

/*
 * Kinds of input that are recognized by their first bytes. form_find takes the first match, so
 * "k8s:enc:kms:v1:" stands before "k8s:enc:". All strings are constants.
 */
static const struct form {
    const char *start;
    size_t len;
    enum input_kind kind;
    const char *what;
} forms[] = {
    FORM("k8s:enc:kms:v1:", INPUT_V1, "is a value of KMS v1"),
    FORM("k8s:enc:kms:v2:", INPUT_V2, "is a value of KMS v2"),
    FORM("k8s:enc:", INPUT_FOREIGN, "is encrypted by another provider than KMS"),
    FORM("k8s\0", INPUT_PLAIN, "is not encrypted: it is the object itself"),
    OTHER("\x1f\x8b", COMPRESSED("gzip")),
    OTHER("\x28\xb5\x2f\xfd", COMPRESSED("zstd")),
    OTHER("\xfd" "7zXZ", COMPRESSED("xz")),
    OTHER("BZh", COMPRESSED("bzip2")),
    OTHER("PK\3\4", COMPRESSED("zip")),
    OTHER("SQLite format 3", SQLITE),
    OTHER("\x37\x7f\x06", "is the write-ahead log of SQLite: name the database beside it"),
    OTHER("\xff\xfe", "is UTF-16, as PowerShell's > writes it: its octets are lost, fetch it anew"),
    OTHER("\xfe\xff", "is UTF-16: its octets are lost, fetch it anew"),
    OTHER("\xef\xbb\xbf", "has a byte order mark: an editor has saved it, fetch it anew"),
    OTHER("{\"level\":", ERROR_TEXT),
    OTHER("Error", ERROR_TEXT),
    OTHER("error", ERROR_TEXT),
    OTHER("Unable to connect", ERROR_TEXT),
    OTHER("context deadline exceeded", ERROR_TEXT),
    OTHER("null", "is the word null: jq has found nothing; does the etcd key exist?"),
    OTHER("apiVersion:", "is YAML of kubectl: an object that is readable, not what etcd holds"),
    OTHER("kind:", "is YAML of kubectl: an object that is readable, not what etcd holds"),
    OTHER("\"ClusterID\"", "is text of etcdctl: ask for -w protobuf in place of -w fields"),
    OTHER("\\x", "is hexadecimal with \\x: decode it first (tr -d '\\\\x' | xxd -r -p)"),
    OTHER("X'", "is hexadecimal of SQL: take what is between the quotes (xxd -r -p)"),
    OTHER("0x", "is hexadecimal: decode it first, without its 0x (xxd -r -p)"),
    OTHER("0000000", "is a hex dump: undo it first (xxd -r)"),
    OTHER("PRAGMA", "is SQL: give the database to sqlite3, with rangeresponse.sql (deploy/k3s)"),
    OTHER("-----BEGIN", "is PEM, a certificate or a key, and no value of etcd"),
    OTHER("b'k8s:enc:", "is a literal of Python: write the octets themselves"),
    OTHER("\"", "is a string in quotes: write it raw (jq -r), then decode it (base64 -d)"),
};

/*
 * Whether JSON is output of `etcdctl -w json`, or an object cut out of it. The name of the
 * first member decides. The first byte must be '{'.
 */
static bool json_of_etcd(const uint8_t *bytes, size_t len) {
    static const char *const members[] = {"\"header\"", "\"kvs\"", "\"key\"", "\"count\"", "\"create_revision\""};
    size_t at = 1;
    while (at < len && is_space((char)bytes[at]))
        at++;
    for (size_t i = 0; i < sizeof members / sizeof *members; i++)
        if (len - at >= strlen(members[i]) && memcmp(bytes + at, members[i], strlen(members[i])) == 0)
            return true;
    return false;
}

/*
 * Names the encoding of an input by the characters that occur in it: hexadecimal, base64,
 * other text, or none of these. Recognizes a KEK by the length of its base64. The input must
 * contain more than white space.
 */
static const char *alphabet_name(const uint8_t *bytes, size_t len) {
    bool hex = true, base64 = true, text = true;
    size_t letters = 0;
    while (len > 0 && is_space((char)bytes[len - 1]))
        len--;
    for (size_t i = 0; i < len; i++) {
        unsigned c = bytes[i];
        bool space = is_space((char)c), digit = c >= '0' && c <= '9', letter = (c | 32) >= 'a' && (c | 32) <= 'z';
        hex &= space || digit || (letter && (c | 32) <= 'f');
        base64 &= space || digit || letter || (c && strchr("+/-_=", (int)c));
        text &= space || (c >= ' ' && c != 0x7f);
        letters += !space;
    }
    return letters >= 8 && hex ? "is hexadecimal: decode it first (xxd -r -p)"
           : base64 && letters == 44 && bytes[len - 1] == '='
               ? "looks like a KEK, not like a value: a KEK goes into KMS_KEK_FILE"
           : letters >= 8 && base64 ? "is base64: decode it first (base64 -d)"
           : text                   ? "is text, and no value of etcd"
                                    : "is none of the forms that etcd has, or is damaged at its beginning";
}

/*
 * Whether the bytes may be the beginning of a RangeResponse. Looks at the header, which has
 * only varints with the field numbers 1 to 4, and at the first byte of the first entry. `more`
 * and `count` may come before that entry. The header must be within the bytes. A second header
 * begins another response, and is enough.
 */
static bool response_starts(const uint8_t *bytes, size_t len) {
    const uint8_t *at = bytes, *end = bytes + len;
    uint64_t tag, n;
    for (bool first = true; at < end; first = false) {
        if (varint_next(&at, end, &tag) < 0 || varint_next(&at, end, &n) < 0)
            return false;
        if (tag == RANGE_KVS)
            return at == end || n == 0 || *at == (KV_KEY << 3 | 2);
        if (tag == RANGE_COUNT || tag == RANGE_MORE)
            continue;
        if (tag != RANGE_HEADER || !first || n > (uint64_t)(end - at))
            return tag == RANGE_HEADER && !first;
        struct field f;
        for (const uint8_t *header_end = at + n; at < header_end;)
            if (field_next(&at, header_end, &f) <= 0 || f.number > 4 || f.wire_type != 0)
                return false;
    }
    return len > 0;
}

/* Judges an input that form_find does not know. The kind is INPUT_RESPONSE or INPUT_OTHER. */
static struct input input_judge_whole(const uint8_t *bytes, size_t len) {
    static const uint8_t bolt_magic[] = {0xed, 0xda, 0x0c, 0xed}; /* page of bbolt: https://github.com/etcd-io/bbolt */
    enum { BOLT_MAGIC_AT = 16 };
    struct field o[FIELDS + 1], first;
    const uint8_t *at = bytes;
    if (len >= BOLT_MAGIC_AT + sizeof bolt_magic && memcmp(bytes + BOLT_MAGIC_AT, bolt_magic, sizeof bolt_magic) == 0)
        return (struct input){INPUT_OTHER, "is a snapshot or database of etcd: restore it first (etcdutl snapshot restore)"};
    if (response_starts(bytes, len))
        return (struct input){INPUT_RESPONSE, "is a RangeResponse of etcd"};
    if (fields_find(o, encrypted_object, bytes, len) == 0 && o[OBJECT_KEY_ID].len == KEY_ID_LEN &&
        sealed_shaped(o[OBJECT_SOURCE].bytes, o[OBJECT_SOURCE].len))
        return (struct input){INPUT_OTHER, "is an EncryptedObject without its k8s:enc:kms:v2:NAME: in front"};
    if (field_next(&at, bytes + len, &first) > 0 && first.number == KV_KEY && first.wire_type == 2 && first.len > 0 &&
        first.bytes[0] == '/')
        return (struct input){INPUT_OTHER, "is a KeyValue of etcd's database: take its value alone, and name its etcd key"};
    for (at = bytes; len - (size_t)(at - bytes) >= KMS_PREFIX_LEN; at++)
        if (memcmp(at, "k8s:enc:kms:v", KMS_PREFIX_LEN - 2) == 0)
            return (struct input){INPUT_OTHER, "has something in front of a value: cut that off, up to k8s:enc:"};
    return (struct input){INPUT_OTHER, alphabet_name(bytes, len)};
}

/* The form that the bytes begin with, or NULL. */
static const struct form *form_find(const uint8_t *bytes, size_t len) {
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
        if (len >= forms[i].len && memcmp(bytes, forms[i].start, forms[i].len) == 0)
            return &forms[i];
    return NULL;
}

/* Recognizes an input by its bytes: a whole value, or the beginning of standard input. */
static struct input input_judge(const uint8_t *bytes, size_t len) {
    const struct form *form = form_find(bytes, len);
    size_t blank = 0;
    if (form)
        return (struct input){form->kind, form->what};
    while (blank < len && is_space((char)bytes[blank]))
        blank++;
    if (blank == len)
        return (struct input){INPUT_OTHER, len == 0 ? "is empty: has what should have written a value failed?"
                                                    : "is white space alone: does the etcd key exist?"};
    if (bytes[0] == '{')
        return json_of_etcd(bytes, len) ? (struct input){INPUT_OTHER, ETCD_JSON}
                                        : (struct input){INPUT_PLAIN, "is not encrypted: it is an object in JSON"};
    if (bytes[0] != '/')
        return input_judge_whole(bytes, len);
    const uint8_t *newline = memchr(bytes, '\n', len);
    size_t left = newline ? len - (size_t)(newline + 1 - bytes) : 0;
    if (left == 0 || newline[1] == '/')
        return (struct input){INPUT_OTHER, "has an etcd key and no value: ask without --keys-only"};
    form = form_find(newline + 1, left);
    if (!form)
        return (struct input){INPUT_OTHER, "has an etcd key on its first line, and no value of Kubernetes behind it"};
    if (form->kind == INPUT_V1 || form->kind == INPUT_V2)
        return (struct input){INPUT_KEY_LINE, "has the etcd key on a line before the value"};
    return (struct input){form->kind, form->what};
}

/* Results of opening a value. Indexes of audit_labels. */
enum value_state {
    VALUE_OPENED,
    VALUE_PLAIN,       /* not encrypted */
    VALUE_FOREIGN,     /* sealed by another provider or plugin */
    VALUE_UNKNOWN_KEY, /* sealed under a KEK that is not in the ring */
    VALUE_BROKEN,      /* damaged, or not recognized as a value */
};

/*
 * A value, and the object in it. Only a value with the state VALUE_OPENED owns an object; the
 * caller ends it with value_wipe.
 */
struct value {
    enum value_state state;
    enum api api;
    char key_id[KEY_ID_LEN + 1]; /* of the KEK that has sealed the DEK; empty if it is not known */
    const char *why;             /* completes a sentence that begins with "the value"; not with VALUE_OPENED */
    uint8_t *object;             /* len bytes from malloc, or NULL */
    size_t len;
};

/* Sets the state of a value that has not opened. `why` is a constant. */
static void value_fail(struct value *v, enum value_state state, const char *why) {
    v->state = state;
    v->why = why;
}

static void value_wipe(struct value *v) {
    if (v->object) {
        wipe(v->object, v->len);
        free(v->object);
        v->object = NULL;
    }
}

/*
 * Opens an object (nonce[12], ciphertext, tag[16]) under an AES key. Sets the state of the
 * value, and its object if the tag is right.
 */
static void value_open_object(struct value *v, const struct ring *ring, const struct field *etcd_key,
                              const uint8_t *aes_key, size_t aes_len, const uint8_t *data, size_t len) {
    enum { GCM_NONCE_BYTES = 12 };
    if (len < GCM_NONCE_BYTES + TAG_BYTES || (aes_len != 16 && aes_len != 24 && aes_len != 32)) {
        value_fail(v, VALUE_BROKEN, "is cut short, or its data key has no AES length");
        return;
    }
    v->len = len - GCM_NONCE_BYTES - TAG_BYTES;
    v->object = malloc(v->len + 1);
    if (!v->object)
        die("out of memory");
    v->state = VALUE_OPENED;
    if (gcm_crypt(&ring->suite, false, aes_key, aes_len, data, etcd_key->bytes, etcd_key->len, data + GCM_NONCE_BYTES,
                  v->len, v->object) == 0)
        return;
    value_wipe(v);
    value_fail(v, VALUE_BROKEN,
               v->api == API_V2 ? "does not open: it is damaged, or of another etcd key"
                                : "does not open: it is damaged, of another etcd key, or AES-CBC "
                                  "(Kubernetes up to 1.24), which carries no tag and is not opened");
}

/*
 * Opens a sealed DEK with the ring, and then the data with the DEK. If `seed` is set, the DEK
 * is a seed: the AES key is derived from it and the first 32 bytes of the data. Sets the state
 * of the value, its key_id if the DEK has the sealed form, and its object on success.
 */
static void value_open_data(struct value *v, const struct ring *ring, const struct field *etcd_key,
                            const uint8_t *sealed, size_t sealed_len, const uint8_t *data, size_t len, bool seed) {
    enum { INFO_BYTES = 32 };
    uint8_t dek[V2_CIPHERTEXT_MAX], expanded[KEK_BYTES], info[INFO_BYTES + 1];
    if (!sealed_shaped(sealed, sealed_len) || sealed_len > V2_CIPHERTEXT_MAX) {
        value_fail(v, VALUE_BROKEN, "has a data key that kmsplugin did not seal, or is damaged or cut short");
        return;
    }
    hex_encode(sealed + 1, FINGERPRINT_BYTES, v->key_id);
    enum opened opened = open_sealed(ring, v->api, sealed, sealed_len, dek);
    size_t dek_len = sealed_len - SEALED_OVERHEAD;
    if (opened == OPEN_UNKNOWN_KEY) {
        value_fail(v, VALUE_UNKNOWN_KEY, "needs a KEK that is not configured");
    } else if (opened != OPENED) {
        value_fail(v, VALUE_BROKEN, "has a data key that does not open: it is damaged");
    } else if (!seed) {
        value_open_object(v, ring, etcd_key, dek, dek_len, data, len);
    } else if (len < INFO_BYTES) {
        value_fail(v, VALUE_BROKEN, "is cut short");
    } else { /* HKDF-Expand, RFC 5869: one block, T(1) */
        memcpy(info, data, INFO_BYTES);
        info[INFO_BYTES] = 0x01;
        hmac_sha256(dek, dek_len, info, sizeof info, expanded, sizeof expanded);
        value_open_object(v, ring, etcd_key, expanded, sizeof expanded, data + INFO_BYTES, len - INFO_BYTES);
    }
    wipe(dek, sizeof dek);
    wipe(expanded, sizeof expanded);
}

/*
 * Opens a value of KMS v1. The bytes begin after the prefix, with the provider's name. The
 * name ends at a colon, but may have colons within it (an ARN, a name of Amazon's cloud, has
 * several). Every colon is therefore tried as the end of the name, and the value opens at the
 * one where the tags are right. If it opens at none, the result is that of the first colon
 * with a sealed DEK behind it, because this result names the missing KEK. V1_NAME_MAX limits
 * the work for a forged value.
 */
static void value_open_v1(struct value *v, const struct ring *ring, const struct field *etcd_key,
                          const uint8_t *bytes, size_t len) {
    const uint8_t *at = bytes, *end = bytes + len;
    bool shaped = false;
    value_fail(v, VALUE_BROKEN, "has a data key that kmsplugin did not seal, or is damaged or cut short");
    while (at == bytes || at - bytes < V1_NAME_MAX) {
        at = memchr(at, ':', (size_t)(end - at));
        if (!at)
            return;
        at++;
        size_t left = (size_t)(end - at), sealed_len = left < 2 ? 0 : (size_t)at[0] << 8 | at[1];
        if (left < 2 || sealed_len > left - 2 || !sealed_shaped(at + 2, sealed_len))
            continue;
        struct value reading = {.api = API_V1};
        value_open_data(&reading, ring, etcd_key, at + 2, sealed_len, at + 2 + sealed_len, left - 2 - sealed_len, false);
        if (reading.state == VALUE_OPENED || !shaped)
            *v = reading;
        if (reading.state == VALUE_OPENED)
            return;
        shaped = true;
    }
}

/*
 * Whether an EncryptedObject is kmsplugin's and not another plugin's. One of three conditions
 * is enough. The keyID has the form of kmsplugin's key_ids. The keyID is empty, which is damage,
 * as no plugin has an empty one. `kek` is not NULL: it is the KEK of the ring under which the
 * DEK is sealed, and the keyID is damaged if it has another form.
 */
static bool object_is_ours(const struct field *key_id, const struct kek *kek) {
    bool ours = key_id->len == KEY_ID_LEN;
    for (size_t i = 0; i < key_id->len && ours; i++)
        ours = key_id->bytes[i] && strchr("0123456789abcdef", key_id->bytes[i]);
    return ours || key_id->len == 0 || kek;
}

/*
 * Opens a value of KMS v2. The bytes begin after the prefix, with the provider's name, which
 * has no colon in v2. The keyID must be the one in the sealed DEK, and there must be no
 * annotations.
 */
static void value_open_v2(struct value *v, const struct ring *ring, const struct field *etcd_key,
                          const uint8_t *bytes, size_t len) {
    enum { TYPE_KEY, TYPE_SEED };
    const uint8_t *colon = memchr(bytes, ':', len);
    struct field o[FIELDS + 1];
    if (!colon || fields_find(o, encrypted_object, colon + 1, len - (size_t)(colon + 1 - bytes)) < 0 ||
        utf8_check(o[OBJECT_KEY_ID].bytes, o[OBJECT_KEY_ID].len) < 0) {
        value_fail(v, VALUE_BROKEN, "is no EncryptedObject: it is damaged or cut short");
        return;
    }
    const struct field *id = &o[OBJECT_KEY_ID], *sealed = &o[OBJECT_SOURCE], *data = &o[OBJECT_DATA];
    char sealing_id[KEY_ID_LEN + 1] = "";
    bool shaped = sealed_shaped(sealed->bytes, sealed->len);
    if (shaped)
        hex_encode(sealed->bytes + 1, FINGERPRINT_BYTES, sealing_id);
    const uint8_t *type_at = o[OBJECT_TYPE].bytes;
    uint64_t type = TYPE_KEY;
    if (o[OBJECT_TYPE].number)
        varint_next(&type_at, type_at + o[OBJECT_TYPE].len, &type);
    if (!object_is_ours(id, shaped ? ring_find(ring, sealed->bytes + 1) : NULL))
        value_fail(v, VALUE_FOREIGN, "was sealed by another KMS plugin: its keyID is none of kmsplugin's");
    else if (id->len != strlen(sealing_id) || memcmp(id->bytes, sealing_id, id->len) != 0 || o[OBJECT_ANNOTATIONS].number)
        value_fail(v, VALUE_BROKEN, "has a keyID that is not its data key's, or annotations: it is damaged");
    else if (type > TYPE_SEED)
        value_fail(v, VALUE_BROKEN, "has a data key of a kind that this version does not know");
    else
        value_open_data(v, ring, etcd_key, sealed->bytes, sealed->len, data->bytes, data->len, type == TYPE_SEED);
}

/*
 * Opens the value of an etcd key, which is the associated data. Sets `v` completely; what it
 * had before is not freed.
 */
static void value_open(struct value *v, const struct ring *ring, const struct field *etcd_key, const uint8_t *bytes,
                       size_t len) {
    struct input in = input_judge(bytes, len);
    *v = (struct value){.api = in.kind == INPUT_V1 ? API_V1 : API_V2};
    if (in.kind == INPUT_V1)
        value_open_v1(v, ring, etcd_key, bytes + KMS_PREFIX_LEN, len - KMS_PREFIX_LEN);
    else if (in.kind == INPUT_V2)
        value_open_v2(v, ring, etcd_key, bytes + KMS_PREFIX_LEN, len - KMS_PREFIX_LEN);
    else
        value_fail(v, in.kind == INPUT_PLAIN ? VALUE_PLAIN : in.kind == INPUT_FOREIGN ? VALUE_FOREIGN : VALUE_BROKEN, in.what);
}

/* Replaces each \r\n from offset `from` on by \n. Returns the new length. */
static size_t crlf_undo(uint8_t *bytes, size_t from, size_t len) {
    size_t to = from;
    for (size_t i = from; i < len; i++)
        if (bytes[i] != '\r' || i + 1 == len || bytes[i + 1] != '\n')
            bytes[to++] = bytes[i];
    return to;
}

/*
 * A reader of standard input, which reads only as far as it must. It is on the stack of its
 * verb, which frees `bytes`. at <= len <= cap always holds.
 */
struct reader {
    const char *verb; /* for messages */
    uint8_t *bytes; /* the part in memory */
    size_t at, len, cap; /* the next byte; bytes in memory; size of the buffer */
    bool crlf; /* a terminal has turned each \n into \r\n, and the reader turns it back */
    bool header, more; /* the present response has had a header; it says that entries were left out */
    uint64_t entries, count; /* entries read of the present response; number that etcd gives after them */
    uint64_t total; /* entries of all responses so far */
};

/* Dies with a sentence that begins with "standard input". `what` completes it. */
__attribute__((noreturn))
static void reader_die(const struct reader *r, const char *what) {
    die("%s: standard input %s", r->verb, what);
}

/*
 * Reads until n bytes are available at r->bytes + r->at. Returns false if the input ends
 * before. Pointers into r->bytes are not valid afterwards. Dies if n is over ENTRY_MAX, or if
 * read(2) fails.
 */
static bool reader_need(struct reader *r, size_t n) {
    size_t need = n + r->crlf; /* one more, as a last \r may turn out to be half of a \r\n */
    if (r->len - r->at >= need)
        return true;
    if (n > ENTRY_MAX)
        reader_die(r, "has more than 4 MiB for one value, which etcd does not");
    if (r->at > 0)
        memmove(r->bytes, r->bytes + r->at, r->len - r->at);
    r->len -= r->at;
    r->at = 0;
    if (r->cap < need + IN_BYTES) {
        r->cap = 2 * r->cap > need + IN_BYTES ? 2 * r->cap : need + IN_BYTES;
        r->bytes = realloc(r->bytes, r->cap);
        if (!r->bytes)
            die("out of memory");
    }
    while (r->len < need) {
        ssize_t got = read(STDIN_FILENO, r->bytes + r->len, r->cap - r->len);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            reader_die(r, strerror(errno));
        if (got == 0)
            return r->len >= n;
        size_t from = r->len - (r->len > 0 && r->bytes[r->len - 1] == '\r');
        r->len += (size_t)got;
        if (r->crlf)
            r->len = crlf_undo(r->bytes, from, r->len);
    }
    return true;
}

/*
 * Recognizes standard input by its first JUDGED_BYTES bytes. A RangeResponse begins with a
 * byte 0x0a, which is \n. A terminal on the way has turned this and each later \n into \r\n.
 * The reader turns them back, and a note on stderr says so.
 */
static struct input reader_judge(struct reader *r) {
    reader_need(r, JUDGED_BYTES);
    bool terminal = r->len >= 2 && memcmp(r->bytes, "\r\n", 2) == 0; /* in place of a header's tag, 0x0a */
    if (terminal)
        r->len = crlf_undo(r->bytes, 0, r->len);
    struct input in = input_judge(r->bytes, r->len);
    r->crlf = terminal && in.kind == INPUT_RESPONSE;
    if (r->crlf)
        note("%s: standard input came through a terminal: each \\r\\n is taken for the newline that it was", r->verb);
    return in;
}

/* Reads a varint. Returns false at the end of input. Dies if the varint is cut off. */
static bool reader_varint(struct reader *r, uint64_t *value) {
    enum { VARINT_MAX = 10 };
    reader_need(r, VARINT_MAX);
    const uint8_t *start = r->bytes + r->at, *at = start;
    if (r->len == r->at)
        return false;
    if (varint_next(&at, r->bytes + r->len, value) < 0)
        reader_die(r, "is no whole RangeResponse of etcd: it is damaged or cut off");
    r->at += (size_t)(at - start);
    return true;
}

/*
 * Dies if the present response does not have all its entries. etcd writes the header first and
 * the number of all entries last, so a response that was cut off has another number or none.
 */
static void range_end(const struct reader *r) {
    if (r->entries == 0 && r->count > 0)
        reader_die(r, "has the number of entries alone: ask without --count-only");
    if (r->more || ((r->header || r->count > 0) && r->count != r->entries))
        die("%s: %llu of %llu entries: the response was cut off, or asked for with --limit", r->verb,
            (unsigned long long)r->entries, (unsigned long long)r->count);
}

/*
 * Reads the next entry of a RangeResponse. The fields in `entry` are valid until the next
 * call. Returns false at the end of input; the caller then checks the response with range_end.
 * Another response may follow a complete one, as when the output of two etcdctl commands goes
 * into one pipe. Dies if the input is not a sequence of RangeResponses.
 */
static bool range_next(struct reader *r, struct field entry[FIELDS + 1]) {
    uint64_t tag, n;
    while (reader_varint(r, &tag)) {
        if (!reader_varint(r, &n))
            reader_die(r, "ends in the middle of a field");
        if (tag == RANGE_MORE) {
            r->more = n != 0;
        } else if (tag == RANGE_COUNT) {
            r->count = n;
        } else if (tag == RANGE_HEADER || tag == RANGE_KVS) {
            if (n > ENTRY_MAX)
                reader_die(r, "has more than 4 MiB for one entry, which etcd does not");
            if (!reader_need(r, (size_t)n))
                reader_die(r, "ends in the middle of an entry");
            const uint8_t *bytes = r->bytes + r->at;
            r->at += (size_t)n;
            if (tag == RANGE_KVS) {
                if (fields_find(entry, key_value, bytes, (size_t)n) < 0)
                    reader_die(r, "has an entry that is none of etcd's");
                r->entries++;
                r->total++;
                return true;
            }
            bool another = r->header || r->entries > 0;
            r->header = true;
            if (another)
                range_end(r);
            r->entries = r->count = 0;
        } else {
            reader_die(r, "is no RangeResponse of etcd from some point on: it is damaged");
        }
    }
    return false;
}

/*
 * Like value_open. If the value does not open and ends with a newline, it is opened once more
 * without it: `etcdctl get` prints a newline after a value.
 */
static void value_open_line(struct value *v, const struct ring *ring, const struct field *etcd_key,
                            const uint8_t *bytes, size_t len) {
    struct value without;
    value_open(v, ring, etcd_key, bytes, len);
    if (v->state != VALUE_BROKEN || len == 0 || bytes[len - 1] != '\n')
        return;
    value_open(&without, ring, etcd_key, bytes, len - 1);
    if (without.state != VALUE_BROKEN)
        *v = without;
}

/*
 * Whether a program has treated the bytes as text. Such a program replaces most bytes over
 * 0x7f with the character U+FFFD (EF BF BD in UTF-8).
 */
static bool text_replaced(const uint8_t *bytes, size_t len) {
    size_t replaced = 0;
    for (size_t i = 0; i + 3 <= len; i++)
        replaced += memcmp(bytes + i, "\xef\xbf\xbd", 3) == 0;
    return replaced > len / 32;
}

/*
 * Opens a raw value. If it does not open as it is, each \r\n in it is replaced by \n, in place,
 * and the result is opened: a terminal may have turned each \n into \r\n.
 */
static void raw_open(struct value *v, const struct ring *ring, const struct field *etcd_key, uint8_t *bytes, size_t len) {
    struct value undone = {.state = VALUE_BROKEN};
    value_open_line(v, ring, etcd_key, bytes, len);
    if (v->state == VALUE_OPENED)
        return; /* an unknown key could be one whose fingerprint has a \n */
    size_t left = crlf_undo(bytes, 0, len);
    if (left < len)
        value_open_line(&undone, ring, etcd_key, bytes, left);
    if (undone.state == VALUE_OPENED)
        note("unseal: the value came through a terminal: each \\r\\n is taken for the newline that it was");
    if (undone.state == VALUE_OPENED || (undone.state == VALUE_UNKNOWN_KEY && v->state != VALUE_UNKNOWN_KEY)) {
        *v = undone;
    } else if (v->state != VALUE_UNKNOWN_KEY && text_replaced(bytes, left)) {
        value_fail(v, VALUE_BROKEN, "went through a program that took it for text: octets are lost, fetch it anew");
    }
}

/*
 * Opens a raw value from standard input. Its etcd key is `etcd_key`, or with INPUT_KEY_LINE
 * the first line of the input. If both are there, they must be equal.
 */
static void unseal_raw(struct value *v, const struct ring *ring, const char *etcd_key, struct reader *r,
                       enum input_kind kind) {
    while (reader_need(r, r->len + 1)) /* until the end of input */
        continue;
    uint8_t *bytes = r->bytes;
    size_t len = r->len;
    struct field key = {.bytes = (const uint8_t *)etcd_key, .len = etcd_key ? strlen(etcd_key) : 0};
    if (kind == INPUT_KEY_LINE) {
        size_t line = (size_t)((uint8_t *)memchr(bytes, '\n', len) - bytes), line_len = line - (bytes[line - 1] == '\r');
        if (etcd_key && (line_len != key.len || memcmp(bytes, etcd_key, line_len) != 0))
            reader_die(r, "has another etcd key on its first line than the one named");
        note("unseal: standard input has an etcd key on its first line: the value is taken for that key's");
        key = (struct field){.bytes = bytes, .len = line_len};
        bytes += line + 1;
        len -= line + 1;
    }
    raw_open(v, ring, &key, bytes, len);
}

/*
 * Opens the entry of a RangeResponse that has the key `etcd_key`, or the only entry if
 * `etcd_key` is NULL. The entry is copied, and opened only when the response has been read to
 * its end and is complete.
 */
static void unseal_response(struct value *v, const struct ring *ring, const char *etcd_key, struct reader *r) {
    struct field entry[FIELDS + 1], key = {0};
    uint8_t *kept = NULL;
    size_t len = 0;
    while (range_next(r, entry)) {
        const struct field *k = &entry[KV_KEY];
        if (etcd_key && (k->len != strlen(etcd_key) || memcmp(k->bytes, etcd_key, k->len) != 0))
            continue;
        if (kept)
            reader_die(r, etcd_key ? "has several entries of this etcd key"
                                   : "has several entries: name one etcd key, or use --all, or audit");
        len = entry[KV_VALUE].len;
        kept = malloc(k->len + len + 1);
        if (!kept)
            die("out of memory");
        memcpy(kept, k->bytes, k->len);
        memcpy(kept + k->len, entry[KV_VALUE].bytes, len);
        key = (struct field){.bytes = kept, .len = k->len};
    }
    range_end(r);
    if (!kept)
        reader_die(r, etcd_key && r->total > 0 ? "has no entry of this etcd key" : "has no entry: does the etcd key exist?");
    if (etcd_key)
        note("unseal: standard input is a RangeResponse: its entry of this etcd key is taken");
    value_open(v, ring, &key, kept + key.len, len);
    free(kept);
}

/*
 * The verb unseal: opens one value from standard input, and writes the object to standard
 * output. Dies with the reason if the value does not open.
 */
static int unseal(const struct ring *ring, const char *etcd_key) {
    struct reader r = {.verb = "unseal"};
    struct value v;
    struct input in = reader_judge(&r);
    if (in.kind == INPUT_RESPONSE)
        unseal_response(&v, ring, etcd_key, &r);
    else if (in.kind == INPUT_KEY_LINE || (etcd_key && (in.kind == INPUT_V1 || in.kind == INPUT_V2)))
        unseal_raw(&v, ring, etcd_key, &r, in.kind);
    else if (in.kind == INPUT_V1 || in.kind == INPUT_V2)
        die("unseal: standard input %s: name its etcd key, too", in.what);
    else
        reader_die(&r, in.what);
    free(r.bytes);
    if (v.state == VALUE_UNKNOWN_KEY)
        die("unseal: no KEK is configured with key_id %s", v.key_id);
    if (v.state != VALUE_OPENED)
        die("unseal: the value %s", v.why);
    int rv = write_all(STDOUT_FILENO, v.object, v.len), error = errno;
    value_wipe(&v);
    if (rv < 0)
        die("standard output: %s", strerror(error));
    return 0;
}

/*
 * Makes a file name from one part of an etcd key, the text between two slashes. Letters,
 * digits and the characters of Kubernetes' names are kept; every other byte becomes %XX, and
 * so does a '.' or '-' at the beginning. The name is therefore never "." or "..", is not
 * hidden, and has no special meaning to a shell. An empty part becomes "%". Returns 0, or -1
 * with errno if the name is too long.
 */
static int file_name(char name[NAME_MAX + 1], const uint8_t *part, size_t len) {
    struct text t = {.buf = name, .cap = NAME_MAX + 1};
    for (size_t i = 0; i < len; i++) {
        unsigned c = part[i];
        bool alphanumeric = in_range(c, '0', '9') || in_range(c | 32, 'a', 'z');
        if (alphanumeric || (i > 0 && c && strchr(".-", (int)c)) || (c && strchr("_:@+=", (int)c)))
            text_char(&t, (char)c);
        else
            text_add(&t, "%%%02x", c);
    }
    if (len == 0)
        text_char(&t, '%');
    if (t.len == t.cap) {
        errno = ENAMETOOLONG;
        return -1;
    }
    name[t.len] = '\0';
    return 0;
}

/*
 * Opens a directory `name` in the directory `dir`, and makes it first if it does not exist. A
 * symbolic link is not followed. Returns a descriptor, or -1 with errno.
 */
static int directory_enter(int dir, const char *name) {
    if (mkdirat(dir, name, 0700) < 0 && errno != EEXIST)
        return -1;
    return openat(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/*
 * Writes a new file. Removes the file again if it cannot be written completely, and never
 * changes an existing file. Returns 0, or -1 with errno.
 */
static int object_write(int dir, const char *name, const uint8_t *bytes, size_t len) {
    int fd = openat(dir, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return -1;
    int rv = write_all(fd, bytes, len), error = errno;
    if (close(fd) < 0 && rv == 0)
        rv = -1, error = errno;
    if (rv < 0)
        unlinkat(dir, name, 0);
    errno = error;
    return rv;
}

/*
 * Writes an object to a new file below the directory `top`. The path of the file is the etcd
 * key, each part made safe by file_name; missing directories are made. Returns 0, or -1 with
 * errno.
 */
static int object_save(int top, const struct field *etcd_key, const struct value *v) {
    const uint8_t *at = etcd_key->bytes, *end = at + etcd_key->len, *slash;
    char name[NAME_MAX + 1];
    int dir = top, rv = 0;
    if (at < end && *at == '/')
        at++;
    while (rv == 0 && (slash = memchr(at, '/', (size_t)(end - at)))) {
        int below = file_name(name, at, (size_t)(slash - at)) < 0 ? -1 : directory_enter(dir, name);
        int error = errno;
        if (dir != top)
            close(dir);
        errno = error;
        if (below < 0)
            return -1;
        dir = below;
        at = slash + 1;
    }
    rv = file_name(name, at, (size_t)(end - at)) < 0 ? -1 : object_write(dir, name, v->object, v->len);
    int error = errno;
    if (dir != top)
        close(dir);
    errno = error;
    return rv;
}

/*
 * The verb unseal with --all: opens all values of a RangeResponse from standard input, and
 * writes each object to a new file below a directory. A value that does not open, or cannot be
 * written, gets a line on stderr, and the exit status is 1.
 */
static int unseal_all(const struct ring *ring, const char *path) {
    struct reader r = {.verb = "unseal"};
    struct field entry[FIELDS + 1];
    uint64_t written = 0;
    struct input in = reader_judge(&r);
    if (in.kind != INPUT_RESPONSE)
        die("unseal: standard input %s%s", in.what, in.kind == INPUT_OTHER ? "" : ": --all reads " RESPONSE_SOURCE);
    int top = directory_enter(AT_FDCWD, path);
    if (top < 0)
        die("unseal: %s: %s", path, strerror(errno));
    while (range_next(&r, entry)) {
        const struct field *key = &entry[KV_KEY];
        struct value v;
        value_open(&v, ring, key, entry[KV_VALUE].bytes, entry[KV_VALUE].len);
        if (v.state == VALUE_UNKNOWN_KEY)
            note("%.*s needs the KEK with key_id %s", (int)key->len, (const char *)key->bytes, v.key_id);
        else if (v.state != VALUE_OPENED)
            note("%.*s %s", (int)key->len, (const char *)key->bytes, v.why);
        else if (object_save(top, key, &v) < 0)
            note("%.*s cannot be written: %s", (int)key->len, (const char *)key->bytes, strerror(errno));
        else
            written++;
        value_wipe(&v);
    }
    if (syncfs(top) < 0)
        die("unseal: %s: %s", path, strerror(errno));
    close(top);
    free(r.bytes);
    print(STDOUT_FILENO, "written values=%llu\n", (unsigned long long)written);
    range_end(&r);
    if (r.total == 0)
        reader_die(&r, "has no entry: does the prefix exist?");
    if (written < r.total)
        die("unseal: %llu of %llu values were not written", (unsigned long long)(r.total - written),
            (unsigned long long)r.total);
    return 0;
}

/*
 * The counts of an audit. Each row counts the values of one API and one KEK. No two rows have
 * the same API and key_id. The verb audit has it on its stack.
 */
struct audit {
    struct audit_row {
        enum api api;
        enum value_state state; /* VALUE_OPENED or VALUE_UNKNOWN_KEY */
        char key_id[KEY_ID_LEN + 1];
        uint64_t count;
    } rows[AUDIT_ROWS_MAX];
    size_t row_count;
    uint64_t plain, foreign, broken;
    uint64_t missing; /* values under unknown KEKs for which no row was left */
};

/*
 * Counts one value. Anyone who can write to etcd can invent values under any number of unknown
 * KEKs. Such values cannot use up the rows: ROWS_KNOWN rows are kept for the KEKs of the ring,
 * two for each KEK, because there are two APIs.
 */
static void audit_count(struct audit *a, const struct value *v) {
    enum { ROWS_KNOWN = 2 * KEK_MAX };
    size_t i = 0, max = v->state == VALUE_OPENED ? AUDIT_ROWS_MAX : AUDIT_ROWS_MAX - ROWS_KNOWN;
    if (v->state != VALUE_OPENED && v->state != VALUE_UNKNOWN_KEY) {
        (*(v->state == VALUE_PLAIN ? &a->plain : v->state == VALUE_FOREIGN ? &a->foreign : &a->broken))++;
        return;
    }
    while (i < a->row_count && (a->rows[i].api != v->api || strcmp(a->rows[i].key_id, v->key_id) != 0))
        i++;
    if (i == a->row_count && a->row_count >= max) {
        a->missing++;
        return;
    }
    if (i == a->row_count) {
        a->rows[a->row_count] = (struct audit_row){.api = v->api, .state = v->state};
        memcpy(a->rows[a->row_count++].key_id, v->key_id, sizeof v->key_id);
    }
    a->rows[i].count++;
}

/* The names, by value_state, of values that are not under the sealing KEK. */
static const char *const audit_labels[] = {"other-kek", "plaintext", "foreign", "missing-kek", "broken"};

/* Prints a label and an etcd key on a line. The key may contain any bytes, so it is quoted and escaped. */
static void audit_list(const char *label, const struct field *key) {
    char line[LOG_LINE_MAX];
    struct text t = {.buf = line, .cap = sizeof line};
    text_value(&t, (const char *)key->bytes, key->len);
    print(STDOUT_FILENO, "%s %.*s\n", label, (int)t.len, line);
}

/* Prints the counts. Returns the number of values under the sealing KEK. */
static uint64_t audit_print(const struct audit *a, const char *sealing_id) {
    uint64_t sealing = 0;
    for (size_t i = 0; i < a->row_count; i++) {
        const struct audit_row *row = &a->rows[i];
        bool seals = strcmp(row->key_id, sealing_id) == 0;
        print(STDOUT_FILENO, "%s key_id=%s values=%llu %s\n", row->api == API_V2 ? "v2" : "v1", row->key_id,
              (unsigned long long)row->count, seals ? "sealing-kek" : audit_labels[row->state]);
        sealing += seals ? row->count : 0;
    }
    if (a->missing > 0)
        print(STDOUT_FILENO, "further key_ids values=%llu missing-kek\n", (unsigned long long)a->missing);
    print(STDOUT_FILENO, "plaintext values=%llu\nforeign values=%llu\nbroken values=%llu\n", (unsigned long long)a->plain,
          (unsigned long long)a->foreign, (unsigned long long)a->broken);
    return sealing;
}

/*
 * The verb audit: counts the values of a RangeResponse from standard input, to tell whether
 * all KEKs but the sealing one may be retired. Returns 0 if they may. Dies if a value of
 * kmsplugin is under another KEK, if a value does not open, if no value is under the sealing
 * KEK, or if `strict` is set and a value is plaintext or foreign. If `list` is set, prints the
 * etcd key of each value that is not under the sealing KEK.
 */
static int audit(const struct ring *ring, bool strict, bool list) {
    struct reader r = {.verb = "audit"};
    struct audit a = {0};
    struct field entry[FIELDS + 1];
    const char *sealing_id = ring->keks[0].key_id;
    uint64_t empty = 0;
    struct input in = reader_judge(&r);
    if (in.kind != INPUT_RESPONSE)
        die("audit: standard input %s%s", in.what, in.kind == INPUT_OTHER ? "" : ": audit reads " RESPONSE_SOURCE);
    while (range_next(&r, entry)) {
        struct value v;
        value_open(&v, ring, &entry[KV_KEY], entry[KV_VALUE].bytes, entry[KV_VALUE].len);
        audit_count(&a, &v);
        empty += entry[KV_VALUE].len == 0;
        if (list && (v.state != VALUE_OPENED || strcmp(v.key_id, sealing_id) != 0))
            audit_list(audit_labels[v.state], &entry[KV_KEY]);
        value_wipe(&v);
    }
    free(r.bytes);
    uint64_t sealing = audit_print(&a, sealing_id), other = r.total - sealing - a.plain - a.foreign - a.broken;
    range_end(&r);
    if (r.total == 0)
        reader_die(&r, "has no entry: does the prefix exist?");
    if (empty == r.total)
        reader_die(&r, "has etcd keys without values: ask without --keys-only");
    if (other + a.broken > 0)
        die("audit: %llu values are not under the sealing KEK, %llu do not open: keep every KEK",
            (unsigned long long)other, (unsigned long long)a.broken);
    if (sealing == 0)
        die("audit: no value was sealed by kmsplugin");
    if (strict && a.plain + a.foreign > 0)
        die("audit: %llu values are plaintext, %llu under another provider", (unsigned long long)a.plain,
            (unsigned long long)a.foreign);
    return 0;
}

/* ----------------------------------------------------------------- Options
 *
 * The command line: its verbs, its options, and the help text. Each option has a function
 * set_... that checks the value and stores it; the table in options_set says which verb it
 * belongs to. Users and groups may be names, which are looked up in /etc/passwd and
 * /etc/group.
 *
 * A wrong command line ends the program with a sentence and exit status 2, an unknown user or
 * group with status 1.
 *
 * Nothing is opened, bound or read here, except /etc/passwd, /etc/group and the map of uids.
 */

/* The parsed command line. Strings are those of argv. */
struct options {
    struct serve_options serve;
    const char *argument, *expected_key_id, *all; /* of probe or unseal; --expect-key-id; --all */
    int64_t timeout_ms;
    bool strict, list; /* of audit */
};

/* The text of --help. */
static const char help[] =
    "Usage: kmsplugin [VERB] [OPTION]... [ARGUMENT]\n"
    "A Kubernetes KMS plugin (v2 and v1beta1) on a UNIX socket.\n"
    "\n"
    "Verbs:\n"
    "  serve              answer kube-apiserver until SIGTERM (the verb when there is none)\n"
    "  probe [ENDPOINT]   try every RPC on a running plugin; exit 0 if all is well\n"
    "  genkey             print a fresh KEK\n"
    "  keyid              print each KEK's key_id, and its hash as in apiserver's metrics\n"
    "  unseal [ETCD_KEY]  open one etcd value from stdin: raw with ETCD_KEY, else as\n"
    "                     etcdctl get KEY -w protobuf prints it\n"
    "  audit              count by KEK what etcdctl get --prefix ... -w protobuf prints;\n"
    "                     exit 0 if every value of ours opens under the sealing KEK\n"
    "\n"
    "Options of serve:\n"
    "  --listen ENDPOINT           unix:///path or unix:///@name, repeatable\n"
    "                              (unix:///run/kmsplugin/kms.sock)\n"
    "  --mode OCTAL                mode of socket files (0600)\n"
    "  --group NAME|GID            group of socket files\n"
    "  --allow-uid USER|UID[,...]  who may connect (root and the plugin's own uid)\n"
    "  --max-connections N         connections at a time (256)\n"
    "  --sandbox auto|require|off  confinement: as the kernel can, all of it, none (auto)\n"
    "  --log-level LEVEL           error, info or debug (info)\n"
    "Options of probe:\n"
    "  --timeout SECONDS           for all of it (3)\n"
    "  --expect-key-id KEY_ID      fail when the server seals under another KEK\n"
    "Options of unseal:\n"
    "  --all DIR                   every value of etcdctl get --prefix ... -w protobuf, each\n"
    "                              to a new file of its etcd key's name below DIR\n"
    "Options of audit:\n"
    "  --strict                    plaintext and foreign values count as failures\n"
    "  --list                      name the etcd keys not under the sealing KEK\n"
    "\n"
    "  -h, --help                  this text\n"
    "  --version                   versions of kmsplugin and its libraries\n"
    "\n"
    "Keys, for serve, keyid, unseal and audit (the first seals, all open):\n"
    "  KMS_KEK_FILE                a file with one KEK in base64, or several with commas between\n"
    "  KMS_KEK                     the same text in the environment\n";

/*
 * Reads a uid or gid. Returns the number, or -1 for a name. A number that is too large, or
 * any other word that begins with a digit or '-', is wrong usage.
 */
static long long id_parse(const char *option, const char *s) {
    long long n = decimal(s, UINT32_MAX - 1);
    if (n < 0 && (s[0] == '-' || (s[0] >= '0' && s[0] <= '9')))
        die_usage("%s: no name, nor a number up to %u: %s", option, UINT32_MAX - 1, s);
    return n;
}

/* The id in a line "name:password:id:...", or -1 if the line is for another name. */
static long long id_in_line(char *line, const char *name) {
    size_t len = strlen(name);
    char *id = strncmp(line, name, len) == 0 && line[len] == ':' ? strchr(line + len + 1, ':') : NULL;
    char *end = id ? strchr(id + 1, ':') : NULL;
    if (!end || strchr(name, ':'))
        return -1;
    *end = '\0';
    return decimal(id + 1, UINT32_MAX - 1);
}

/*
 * The id of a name in /etc/passwd or /etc/group, or -1. getpwnam and getgrnam would also ask
 * name services, which need libraries that a static binary may not find, and they would make
 * the static binary 9 KB larger.
 */
static long long id_find(const char *path, const char *name) {
    char bytes[1024], line[512]; /* the id comes before the place where a long line is cut */
    size_t len = 0;
    long long id = -1;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (bool more = fd >= 0; more && id < 0;) {
        ssize_t n = read(fd, bytes, sizeof bytes);
        more = n > 0;
        if (!more)
            bytes[0] = '\n', n = 1; /* the last line may lack its newline */
        for (ssize_t i = 0; i < n && id < 0; i++) {
            if (bytes[i] == '\n') {
                line[len] = '\0';
                id = id_in_line(line, name);
                len = 0;
            } else if (len < sizeof line - 1) {
                line[len++] = bytes[i];
            }
        }
    }
    if (fd >= 0)
        close(fd);
    return id;
}

static uid_t uid_parse(const char *s) {
    long long n = id_parse("--allow-uid", s);
    if (n < 0 && (n = id_find("/etc/passwd", s)) < 0)
        die("--allow-uid: no such user: %s", s);
    return (uid_t)n;
}

static gid_t gid_parse(const char *s) {
    long long n = id_parse("--group", s);
    if (n < 0 && (n = id_find("/etc/group", s)) < 0)
        die("--group: no such group: %s", s);
    return (gid_t)n;
}

/* Whether uids in this user namespace are the same as on the host. */
static bool uid_map_is_identity(void) {
    char map[128];
    int fd = open("/proc/self/uid_map", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, map, sizeof map - 1);
    if (fd >= 0)
        close(fd);
    if (n <= 0)
        return false;
    map[n] = '\0';
    const char *at = map;
    return number_next(&at) == 0 && number_next(&at) == 0 && number_next(&at) == UINT32_MAX;
}

/* Reads the list of --allow-uid, which replaces any earlier list. */
static void options_allow(struct serve_options *o, const char *list) {
    char name[256];
    o->uid_count = 0;
    for (const char *comma = list; comma; list = comma ? comma + 1 : list) {
        comma = strchr(list, ',');
        size_t len = comma ? (size_t)(comma - list) : strlen(list);
        if (len == 0 || len >= sizeof name)
            die_usage("--allow-uid: names or numbers with commas between");
        if (o->uid_count == ALLOWED_UIDS_MAX)
            die_usage("--allow-uid: more than %d users", ALLOWED_UIDS_MAX);
        copy_text(name, sizeof name, (const uint8_t *)list, len);
        uid_t uid = uid_parse(name);
        if (uid == UNMAPPED_UID && !uid_map_is_identity())
            die("--allow-uid: %u stands for every unmapped user in this user namespace", uid);
        size_t i = 0;
        while (i < o->uid_count && o->uids[i] != uid)
            i++;
        o->uids[i] = uid;
        o->uid_count += i == o->uid_count;
    }
}

/* Allows root and this process's own user to connect, the default of --allow-uid. */
static void options_allow_default(struct serve_options *o) {
    uid_t own = geteuid();
    o->uids[o->uid_count++] = 0;
    if (own == UNMAPPED_UID && !uid_map_is_identity())
        log_line(LOG_WARN, "msg=\"own uid is not allowed to connect: it stands for every unmapped user\" uid=%u", own);
    else if (own != 0)
        o->uids[o->uid_count++] = own;
}

/* Reads an octal mode up to 0777. */
static mode_t mode_parse(const char *s) {
    unsigned mode = 0;
    size_t len = 0;
    for (; s[len] >= '0' && s[len] <= '7' && len < 5; len++)
        mode = 8 * mode + (unsigned)(s[len] - '0');
    if (len == 0 || s[len] || mode > 0777)
        die_usage("--mode: an octal mode such as 0660");
    return mode;
}

static enum log_level log_level_parse(const char *s) {
    if (strcmp(s, "error") == 0)
        return LOG_ERROR;
    if (strcmp(s, "info") == 0)
        return LOG_INFO;
    if (strcmp(s, "debug") == 0)
        return LOG_DEBUG;
    die_usage("--log-level: error, info or debug");
}

static enum sandbox sandbox_parse(const char *s) {
    if (strcmp(s, "auto") == 0)
        return SANDBOX_AUTO;
    if (strcmp(s, "require") == 0)
        return SANDBOX_REQUIRE;
    if (strcmp(s, "off") == 0)
        return SANDBOX_OFF;
    die_usage("--sandbox: auto, require or off");
}

/* Reads seconds with up to three decimals. Returns milliseconds. */
static int64_t timeout_parse(const char *s) {
    enum { TIMEOUT_MAX_MS = 3600 * 1000 };
    const char *dot = strchr(s, '.');
    size_t whole = dot ? (size_t)(dot - s) : strlen(s), decimals = dot ? strlen(dot + 1) : 0;
    int64_t ms = 0;
    bool right = whole > 0 && whole <= 4 && decimals <= 3 && (!dot || decimals > 0);
    for (size_t i = 0; right && i < whole + 3; i++) { /* reads "2.5" as 2500 */
        char c = i < whole ? s[i] : i - whole < decimals ? dot[1 + i - whole] : '0';
        right = c >= '0' && c <= '9';
        ms = 10 * ms + (c - '0');
    }
    if (!right || ms == 0 || ms > TIMEOUT_MAX_MS)
        die_usage("--timeout: seconds, more than 0 and at most 3600");
    return ms;
}

static size_t max_connections_parse(const char *s) {
    long long n = decimal(s, CONNECTIONS_LIMIT);
    if (n < 1)
        die_usage("--max-connections: a number from 1 to %d", CONNECTIONS_LIMIT);
    return (size_t)n;
}

/* The verbs, and which of them take an argument. */
enum verb { SERVE, PROBE, GENKEY, KEYID, UNSEAL, AUDIT, VERBS };

static const struct {
    const char *name;
    bool argument;
} verbs[VERBS] = {
    [SERVE] = {"serve", false}, [PROBE] = {"probe", true},   [GENKEY] = {"genkey", false},
    [KEYID] = {"keyid", false}, [UNSEAL] = {"unseal", true}, [AUDIT] = {"audit", false},
};

/* The options of serve, probe, unseal and audit, in this order. An option without a value ignores `value`. */
static void set_listen(struct options *o, const char *value) {
    struct sockaddr_un address;
    socklen_t address_len;
    if (o->serve.endpoint_count == LISTENERS_MAX)
        die_usage("--listen: more than %d endpoints", LISTENERS_MAX);
    endpoint_require(value, &address, &address_len); /* a wrong endpoint ends the program early */
    o->serve.endpoints[o->serve.endpoint_count++] = value;
}

static void set_mode(struct options *o, const char *value) {
    o->serve.mode = mode_parse(value);
}

static void set_group(struct options *o, const char *value) {
    o->serve.group = gid_parse(value);
    o->serve.has_group = true;
}

static void set_allow_uid(struct options *o, const char *value) {
    options_allow(&o->serve, value);
}

static void set_max_connections(struct options *o, const char *value) {
    o->serve.max_connections = max_connections_parse(value);
}

static void set_sandbox(struct options *o, const char *value) {
    o->serve.sandbox = sandbox_parse(value);
}

static void set_log_level(struct options *o, const char *value) {
    (void)o;
    log_level = log_level_parse(value);
}

static void set_timeout(struct options *o, const char *value) {
    o->timeout_ms = timeout_parse(value);
}

static void set_expect_key_id(struct options *o, const char *value) {
    if (value[0] == '\0')
        die_usage("--expect-key-id needs a key_id, as kmsplugin keyid prints it");
    o->expected_key_id = value;
}

static void set_all(struct options *o, const char *value) {
    if (value[0] == '\0')
        die_usage("--all needs a directory");
    o->all = value;
}

static void set_strict(struct options *o, const char *value) {
    (void)value;
    o->strict = true;
}

static void set_list(struct options *o, const char *value) {
    (void)value;
    o->list = true;
}

/*
 * Sets one option of a verb. `value` is the text after '=', or the next word of the command
 * line, or NULL. Returns whether the option used it.
 */
static bool options_set(struct options *o, enum verb verb, const char *name, const char *value) {
    static const struct {
        const char *name;
        enum verb verb;
        bool value;
        void (*set)(struct options *, const char *);
    } known[] = {
        {"--listen", SERVE, true, set_listen},
        {"--mode", SERVE, true, set_mode},
        {"--group", SERVE, true, set_group},
        {"--allow-uid", SERVE, true, set_allow_uid},
        {"--max-connections", SERVE, true, set_max_connections},
        {"--sandbox", SERVE, true, set_sandbox},
        {"--log-level", SERVE, true, set_log_level},
        {"--timeout", PROBE, true, set_timeout},
        {"--expect-key-id", PROBE, true, set_expect_key_id},
        {"--all", UNSEAL, true, set_all},
        {"--strict", AUDIT, false, set_strict},
        {"--list", AUDIT, false, set_list},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].verb != verb || strcmp(known[i].name, name) != 0)
            continue;
        if (known[i].value && !value)
            die_usage("%s needs a value", name);
        known[i].set(o, value);
        return known[i].value;
    }
    die_usage("unknown option of %s: %s", verbs[verb].name, name);
}

static bool is_help(const char *s) {
    return strcmp(s, "-h") == 0 || strcmp(s, "--help") == 0;
}

/*
 * Reads the command line into `o`, and returns the verb. Ends the program for --help,
 * --version and wrong usage.
 */
static enum verb options_parse(struct options *o, int argc, char **argv) {
    enum verb verb = SERVE;
    int i = 1;
    *o = (struct options){.timeout_ms = 3000, .serve = {.mode = 0600, .sandbox = SANDBOX_DEFAULT}};
    o->serve.max_connections = CONNECTIONS_DEFAULT;
    for (int j = 1; j < argc && strcmp(argv[j], "--") != 0; j++) {
        if (is_help(argv[j])) {
            print(STDOUT_FILENO, "%s", help);
            exit(0);
        }
    }
    if (argc == 2 && strcmp(argv[1], "--version") == 0) {
        print(STDOUT_FILENO, "kmsplugin " VERSION "\nnghttp2 %s\nprotobuf-c %s\nBearSSL " BEARSSL_VERSION "\n",
              nghttp2_version(0)->version_str, protobuf_c_version());
        exit(0);
    }
    if (argc > 1 && argv[1][0] != '-') {
        while (verb < VERBS && strcmp(verbs[verb].name, argv[1]) != 0)
            verb++;
        if (verb == VERBS)
            die_usage("unknown verb: %s", argv[1]);
        i = 2;
    }
    for (bool plain = false; i < argc; i++) {
        char name[32], *equals = strchr(argv[i], '=');
        if (!plain && strcmp(argv[i], "--") == 0) {
            plain = true;
        } else if (!plain && argv[i][0] == '-' && argv[i][1]) {
            size_t len = equals ? (size_t)(equals - argv[i]) : strlen(argv[i]);
            copy_text(name, sizeof name, (const uint8_t *)argv[i], len);
            bool took = options_set(o, verb, name, equals ? equals + 1 : argv[i + 1]);
            if (equals && !took)
                die_usage("%s takes no value", name);
            i += took && !equals;
        } else if (!verbs[verb].argument || o->argument) {
            die_usage("unknown argument of %s: %s", verbs[verb].name, argv[i]);
        } else {
            o->argument = argv[i];
        }
    }
    if (o->all && o->argument)
        die_usage("unseal: one ETCD_KEY, or --all");
    return verb;
}

/* -------------------------------------------------------------------- Main
 *
 * The start of the process, and the verbs without a section of their own: serve, genkey,
 * keyid. main protects the process, reads the command line, and calls one function for the
 * verb.
 *
 * The order of steps in serve matters. Signals come first. Keys are loaded before anything
 * can connect. The rehearsal comes before the sockets, and confinement after them. A listener
 * becomes ready after the first sealing has succeeded.
 *
 * Nothing here handles a request: server_run does.
 */

/*
 * Opens /dev/null for each standard descriptor that is closed. Otherwise the next file or
 * socket would become standard input or output. Each is opened in the wrong direction on
 * purpose: any use of it still fails, and is reported.
 */
static void descriptors_open(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0 && errno == EBADF && open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY) != fd)
            die("/dev/null: %s", strerror(errno));
}

/*
 * Makes the data read-only that is written only while the program starts (GNU_RELRO in the
 * program headers). Dynamic linkers do this; musl's start code of a static-pie does not.
 * dl_iterate_phdr calls this function for the program first, and the result 1 ends its loop.
 */
static int relro_protect(struct dl_phdr_info *program, size_t size, void *unused) {
    (void)size;
    (void)unused;
    const uintptr_t page = (uintptr_t)getpagesize();
    for (size_t i = 0; i < program->dlpi_phnum; i++) {
        uintptr_t start = program->dlpi_addr + program->dlpi_phdr[i].p_vaddr, end = start + program->dlpi_phdr[i].p_memsz;
        start -= start % page;
        end -= end % page;
        if (program->dlpi_phdr[i].p_type == PT_GNU_RELRO && end > start)
            mprotect((void *)start, end - start, PROT_READ);
    }
    return 1;
}

/*
 * A failed assert in a library calls this function. musl's own version would add stdio (8 KB)
 * and its messages (7 KB) to the static binary. glibc has stdio in memory anyway, and declares
 * the function differently.
 */
#ifndef __GLIBC__
_Noreturn void __assert_fail(const char *assertion, const char *file, int line, const char *function);
_Noreturn void __assert_fail(const char *assertion, const char *file, int line, const char *function) {
    (void)assertion, (void)file, (void)line, (void)function;
    die("an assertion of a library failed");
}

/*
 * nghttp2 calls this function to format error texts, which it passes to a callback that is not
 * set here. musl's own version is 12 KB. This one knows the conversions of text_vadd, and
 * returns the length of the part that fits.
 */
int vsnprintf(char *restrict out, size_t cap, const char *restrict format, va_list args);
int vsnprintf(char *restrict out, size_t cap, const char *restrict format, va_list args) {
    struct text t = {.buf = out, .cap = cap > 0 ? cap - 1 : 0};
    text_vadd(&t, format, args);
    if (cap > 0)
        out[t.len] = '\0';
    return (int)t.len;
}
#endif

/* Keeps the memory of this process out of core files and away from debuggers. */
static void dump_protect(void) {
    const struct rlimit none = {0, 0};
    prctl(PR_SET_DUMPABLE, 0);
    prlimit(0, RLIMIT_CORE, &none, NULL);
}

/* Logs that a listener is ready, and warns about an abstract name. */
static void serve_announce(const struct server *s, const struct listener *l) {
    const struct ring *ring = s->kms.ring;
    char name[ENDPOINT_NAME_BYTES];
    endpoint_name(&l->address, l->address_len, name, sizeof name);
    if (l->address.sun_path[0] == '\0')
        log_line(LOG_WARN, "msg=\"any process of this network namespace can take an abstract name first "
                 "and play the plugin, or fill its queue of connects\" endpoint=%s", name);
    log_line(LOG_INFO, "msg=ready endpoint=%s key_id=%s keks=%zu cipher=%s version=" VERSION, name,
             ring->keks[0].key_id, ring->count, ring->suite.name);
}

/*
 * Waits until the kernel has enough entropy, which may take a while after boot. Afterwards
 * getrandom(2) does not block in any turn. A blocking call makes the kernel collect entropy,
 * so this function makes one. SIGTERM ends the wait (on_early_signal).
 */
static void random_wait(void) {
    const struct timespec pause = {.tv_nsec = ACCEPT_PAUSE_MS * 1000000L};
    uint8_t byte;
    if (random_get(&byte, 1, GRND_NONBLOCK) == 1)
        return;
    if (errno == EAGAIN)
        log_line(LOG_WARN, "msg=\"waiting for the kernel to have random numbers\"");
    while (random_get(&byte, 1, 0) != 1) {
        if (errno != EAGAIN && errno != EINTR)
            die("getrandom: %s", strerror(errno));
        nanosleep(&pause, NULL);
    }
}

/*
 * Seals and opens once, before the server says that it is ready. Returns false with the
 * reason in `a` if that fails.
 */
static bool kms_try(struct kms *kms, struct answer *a) {
    kms_call(kms, V2_STATUS, (const uint8_t *)"", 0, a);
    kms_done(kms);
    random_drop(&kms->random);
    return a->code == GRPC_OK;
}

/* The verb serve. Returns the exit status after a signal has stopped the server. */
static int serve(struct serve_options *options) {
    struct answer first;
    signals_hold();
    clocks_check();
    if (options->uid_count == 0)
        options_allow_default(options);
    struct ring *ring = ring_load();
    if (ring->unlocked)
        log_line(LOG_WARN, "msg=\"the page of the KEKs cannot be locked, and could be swapped out\" mlock=%s",
                 strerror(ring->unlocked));
    sealing_self_test(&ring->suite);
    random_wait();
    bool filtered = serve_rehearse(options, ring);
    struct server *s = server_new(ring, options);
    s->notify = notify_open();
    listeners_open(s);
    const char *lacking = confine(options->sandbox, filtered);
    if (lacking) {
        int error = errno;
        listeners_close(s);
        die("--sandbox require: %s: %s", lacking, strerror(error));
    }
    if (!kms_try(&s->kms, &first)) {
        listeners_close(s);
        die("a first Status fails: %s", first.message);
    }
    for (size_t i = 0; i < s->listener_count; i++) {
        server_watch(s, &s->listeners[i].source);
        serve_announce(s, &s->listeners[i]);
    }
    notify(s->notify, "READY=1");
    server_run(s);
    server_free(s);
    log_line(LOG_INFO, "msg=stopped");
    return 0;
}

/* The verb genkey: prints 32 random bytes in base64. */
static int genkey(void) {
    uint8_t key[KEK_BYTES];
    char text[KEK_BYTES * 2];
    if (random_fill(key, sizeof key) < 0)
        die("getrandom: %s", strerror(errno));
    base64_encode(key, sizeof key, text);
    size_t len = strlen(text);
    text[len] = '\n';
    if (write_all(STDOUT_FILENO, text, len + 1) < 0)
        die("standard output: %s", strerror(errno));
    wipe(key, sizeof key);
    wipe(text, sizeof text);
    return 0;
}

/*
 * The verb keyid: prints the key_id of each KEK, and "sha256:" with a hash of it. The API
 * server shows the hash in its metrics, apiserver_envelope_encryption_key_id_hash_total for
 * example.
 */
static int keyid(const struct ring *ring) {
    for (size_t i = 0; i < ring->count; i++) {
        br_sha256_context sha;
        uint8_t hash[br_sha256_SIZE];
        char hex[2 * br_sha256_SIZE + 1];
        br_sha256_init(&sha);
        br_sha256_update(&sha, ring->keks[i].key_id, KEY_ID_LEN);
        br_sha256_out(&sha, hash);
        hex_encode(hash, sizeof hash, hex);
        print(STDOUT_FILENO, "%s sha256:%s\n", ring->keks[i].key_id, hex);
    }
    return 0;
}

/* Runs a verb that needs the ring and ends with it. Returns its exit status. */
static int with_ring(enum verb verb, const struct options *o) {
    struct ring *ring = ring_load();
    int rv = verb == KEYID   ? keyid(ring)
             : verb == AUDIT ? audit(ring, o->strict, o->list)
             : o->all        ? unseal_all(ring, o->all)
                             : unseal(ring, o->argument);
    ring_free(ring);
    stack_wipe();
    return rv;
}

int main(int argc, char **argv) {
    struct options options;
    dl_iterate_phdr(relro_protect, NULL);
    descriptors_open();
    dump_protect();
    enum verb verb = options_parse(&options, argc, argv);
    switch (verb) {
    case SERVE:
        return serve(&options.serve);
    case PROBE:
        environment_take(NULL, 0);
        return probe(options.argument ? options.argument : DEFAULT_ENDPOINT, options.timeout_ms, options.expected_key_id);
    case GENKEY:
        environment_take(NULL, 0);
        return genkey();
    default:
        return with_ring(verb, &options);
    }
}
