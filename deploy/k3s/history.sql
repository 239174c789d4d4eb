-- All that kine's table still has under each name, in the form of rangeresponse.sql (which
-- see): values of older rows, of deleted ones, and what each row keeps of the one before it
-- (old_value). Which KEKs do copies of this file need, and does plaintext lie in it?
--
--     sqlite3 -readonly state.db <history.sql | xxd -r -p | kmsplugin audit --strict
.bail on
BEGIN;
CREATE TEMP VIEW entry AS
    SELECT name, value, length(CAST(name AS BLOB)) AS n, length(value) AS v,
        length(CAST(name AS BLOB)) + length(value) + 10 AS nv
    FROM (SELECT name, value FROM kine UNION ALL SELECT name, old_value FROM kine)
    WHERE length(value) > 0;
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
