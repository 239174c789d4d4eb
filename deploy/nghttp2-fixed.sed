# For the sessions and streams of the release build's nghttp2: what kmsplugin tells each session when it begins, as
# constants. The compiler then leaves out what no session of kmsplugin's ever comes to, 16 KB. Nothing else changes: with
# the options, callbacks and SETTINGS that session_options_new, sessions_init, session_init and client_open give, each of
# these is what it was.

# session_options_new
s/\(arg->\)\{0,1\}session->opt_flags\b/(NGHTTP2_OPTMASK_NO_AUTO_WINDOW_UPDATE | NGHTTP2_OPTMASK_NO_HTTP_MESSAGING | NGHTTP2_OPTMASK_NO_CLOSED_STREAMS)/

# No type of extension frame was asked for: all are ignored, and none of these frames is ever there to process. A push is
# an error of the connection, to a server always, and to our client by its SETTINGS.
s/check_ext_type_set(session->user_recv_ext_types,/(0 \&\&/
s/session->builtin_recv_ext_types\b/0/
s/= session_process_\(altsvc\|origin\|priority_update\|extension\)_frame(session)/= NGHTTP2_ERR_PROTO/
s/= session_process_push_promise_frame(session)/= session_inflate_handle_invalid_connection(session, \&iframe->frame, NGHTTP2_ERR_PROTO, "PUSH_PROMISE")/

# SETTINGS_NO_RFC7540_PRIORITIES is 1 in all our SETTINGS: no stream depends on another.
s/session_no_rfc7540_pri_no_fallback(session)/1/
s/session->pending_no_rfc7540_priorities == 1/1/
s/session->pending_no_rfc7540_priorities != 1/0/
s/stream->flags & NGHTTP2_STREAM_FLAG_NO_RFC7540_PRIORITIES/1/
s/nghttp2_stream_in_dep_tree([a-z_]*)/0/

# Callbacks that are never set.
s/session->callbacks\.\(\(recv\|on_invalid_frame_recv\|on_begin_frame\|on_invalid_header\|before_frame_send\|on_frame_not_send\)_callback2\{0,1\}\)\b/((nghttp2_\1)0)/
s/session->callbacks\.\(\(select_padding\|pack_extension\|unpack_extension\|on_extension_chunk_recv\|error\)_callback2\{0,1\}\)\b/((nghttp2_\1)0)/
s/session->callbacks\.\(on_header_callback2\)\b/((nghttp2_\1)0)/
s/session->callbacks\.\(read_length_callback2\{0,1\}\)\b/((nghttp2_data_source_\1)0)/
