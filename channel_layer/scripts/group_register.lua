-- Register a process under a group, or renew its registration.
--   KEYS[1] sorted set of processes by deadline   ARGV[1] process id   ARGV[2] time to live, in milliseconds
-- Returns the deadline, in milliseconds of the broker's clock.
-- One script, because the deadline is counted on the broker's clock: clocks of machines differ by more than the
-- time to live. PEXPIRE only collects groups that all processes left by dying; it is never shortened.
local time = redis.call('TIME')
local ttl_ms = tonumber(ARGV[2])
local deadline_ms = time[1] * 1000 + math.floor(time[2] / 1000) + ttl_ms
redis.call('ZADD', KEYS[1], deadline_ms, ARGV[1])
if redis.call('PTTL', KEYS[1]) < ttl_ms then redis.call('PEXPIRE', KEYS[1], ttl_ms) end
return deadline_ms
