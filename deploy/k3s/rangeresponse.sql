-- What lies in kine's table now, as etcdctl get --prefix ... -w protobuf would print it, in
-- hexadecimal: of each name the newest row, unless that says that it was deleted.
--
--     sqlite3 -readonly state.db <rangeresponse.sql | xxd -r -p | kmsplugin audit
--
-- Secrets, or what -cmd ".parameter set :prefix /registry/configmaps/" names.
--
-- An etcd RangeResponse is a header (0A), the entries (12, each with its key, 0A, and value,
-- 2A), and their number (20). Its lengths are varints, seven bits a byte, low ones first;
-- all have four bytes here, the eighth bit set in all but the last.
.bail on
BEGIN; -- the entries and their number are of one state of the table
CREATE TEMP VIEW entry AS
    SELECT name, value, length(CAST(name AS BLOB)) AS n, coalesce(length(value), 0) AS v,
        length(CAST(name AS BLOB)) + coalesce(length(value), 0) + 10 AS nv
    FROM kine
    WHERE id IN (SELECT max(id) FROM kine GROUP BY name) AND deleted = 0;
CREATE TEMP TABLE wanted AS SELECT coalesce(:prefix, '/registry/secrets/') AS prefix;
SELECT '0A00';
SELECT
    printf('12%02X%02X%02X%02X', nv & 127 | 128, nv >> 7 & 127 | 128, nv >> 14 & 127 | 128, nv >> 21) ||
    printf('0A%02X%02X%02X%02X', n & 127 | 128, n >> 7 & 127 | 128, n >> 14 & 127 | 128, n >> 21) || hex(name) ||
    printf('2A%02X%02X%02X%02X', v & 127 | 128, v >> 7 & 127 | 128, v >> 14 & 127 | 128, v >> 21) || hex(value)
    FROM entry, wanted WHERE substr(name, 1, length(prefix)) = prefix;
SELECT printf('20%02X%02X%02X%02X', c & 127 | 128, c >> 7 & 127 | 128, c >> 14 & 127 | 128, c >> 21)
    FROM (SELECT count(*) AS c FROM entry, wanted WHERE substr(name, 1, length(prefix)) = prefix);
COMMIT;
