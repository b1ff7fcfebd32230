-- List the processes that hold members of a group.
--   KEYS[1] sorted set of processes by deadline, in milliseconds of the broker's clock
-- Returns the process ids; entries past their deadline are removed, not returned.
-- One script, because the deadlines are judged on the broker's clock, in the same round trip.
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
return redis.call('ZRANGE', KEYS[1], 0, -1)
