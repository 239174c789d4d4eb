# The answer to an exercise of doc/tour.md: kmsplugin.c with one metric more, kmsplugin_turns_total.
# A place to count in:
s/^    uint64_t accepted, refused;$/    uint64_t accepted, refused, turns;/
# Each turn counts, in server_run:
/^        server_clock(s);$/a\
        s->metrics.turns++;
# The page shows it, in metrics_write:
/^    metrics_metric(t, "kmsplugin_connections", /i\
    metrics_metric(t, "kmsplugin_turns_total", "counter", "Turns of the event loop.");\
    text_add(t, "kmsplugin_turns_total %llu\\n", (unsigned long long)m->turns);
