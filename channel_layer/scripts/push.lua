-- Append messages to a channel, as many as it has room for.
--   KEYS[1] list of messages   ARGV[1] capacity, in messages; negative: no limit   ARGV[2] expiry, in milliseconds
--   ARGV[3…] encoded messages, in order
-- Returns {number of messages stored, their deadline in milliseconds of the broker's clock}. Less than was given
-- means full: the first ones were stored, for the others the caller raises ChannelFull.
-- Each element is its deadline, 8 bytes big-endian, and the message.
-- One script, because as several commands two senders can both see the last free place, and because only the
-- broker's own clock makes a deadline that all readers agree on. PEXPIRE only collects channels nobody uses any
-- more: every send re-arms it and never shortens it, so it cannot be what makes a message expire early.
local key, capacity, expiry_ms = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local count = #ARGV - 2
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local deadline_ms = now_ms + expiry_ms

if capacity >= 0 then
    local excess = redis.call('LLEN', key) + count - capacity
    if excess > 0 then
        -- Expired messages hold no place. They stand at the head, where all messages of a channel expire alike.
        local expired_count = 0
        for _, element in ipairs(redis.call('LRANGE', key, 0, excess - 1)) do
            if struct.unpack('>I8', element) > now_ms then break end
            expired_count = expired_count + 1
        end
        if expired_count > 0 then redis.call('LPOP', key, expired_count) end
        count = math.max(0, count - (excess - expired_count))
    end
end

if count > 0 then
    local head = struct.pack('>I8', deadline_ms)
    -- In portions, because Lua's unpack() fills a stack of 8,000 places at most.
    local length
    for first = 1, count, 1000 do
        local elements = {}
        for i = first, math.min(first + 999, count) do elements[#elements + 1] = head .. ARGV[i + 2] end
        length = redis.call('RPUSH', key, unpack(elements))
    end
    -- GT leaves a list alone that has no expiry yet, so a new one needs its own call.
    if length == count then
        redis.call('PEXPIRE', key, expiry_ms)
    else
        redis.call('PEXPIRE', key, expiry_ms, 'GT')
    end
end
return {count, deadline_ms}
