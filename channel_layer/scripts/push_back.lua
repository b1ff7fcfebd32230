-- Return elements to the head of a list they were taken from, by a reader that was cancelled.
--   KEYS[1] list   ARGV[1] least time the list is to live, in milliseconds   ARGV[2…] elements, in the order they had
-- Returns the new length of the list.
-- One script, because taking the last element deletes a list together with its expiry: LPUSH alone would make a
-- list that stays for ever if nobody reads it. The elements keep the deadlines they carry.
local key, expiry_ms = KEYS[1], tonumber(ARGV[1])
local length = 0
-- Backwards, because each LPUSH goes to the head.
for i = #ARGV, 2, -1 do length = redis.call('LPUSH', key, ARGV[i]) end
if redis.call('PTTL', key) < expiry_ms then redis.call('PEXPIRE', key, expiry_ms) end
return length
