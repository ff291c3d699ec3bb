-- Counts one batch, exactly once. Only this script writes the keys below. It runs atomically, and Redis logs its effects as one
-- transaction, so after a crash either the whole batch is there or nothing of it.
--
-- KEYS  1 hits     the number of hits so far
--       2 posts    the number of posts so far
--       3 writer   the last batch of this writer (one lane of one process): {sequence, reply}, or {sequence} if the batch failed
--                  half-way, or 'retired'; forgotten after a day
--       4 answers  hash: digest of an Idempotency-Key -> {hits, posts, 1} as answered to it; 1 is the version of what is stored
--       5 order    sorted set: digest -> time of its arrival (microseconds), so that the oldest are forgotten first; later than
--                  all before it, even if the clock was set back
-- ARGV  1 sequence number of this batch: 1, 2, 3 ... for each writer
--       2 hits to count
--       3 posts to count, without those that have an Idempotency-Key
--       4 the number of Idempotency-Keys to remember at most
--       5 ... the digests of the Idempotency-Keys of further posts
--
-- Replies {'counted', sequence, hits, posts, all posts, then for each digest its hits and posts}. There, hits and posts are the
-- totals after the hits of this batch and its posts without a key, and all posts the total with those that have one. An answer
-- of another version is -1, -1. Otherwise replies {'late', sequence}, {'unknown', sequence} or {'failed', sequence}, and has
-- counted nothing.
--
-- Why a batch that is sent twice counts once. A writer sends batch n + 1 only after the reply to batch n, or after it has given
-- batch n up for good.
--   a. The same batch arrives again, because its reply was lost. Its sequence number equals the last one, so the script repeats
--      the first reply.
--   b. A batch was stuck on an old connection and arrives after newer ones. Its sequence number is below the last one: late.
--   c. The writer's key is gone (after a day without a batch, or because the store lost it). The script cannot know whether this
--      batch was counted before: unknown. The writer knows whether it sent the batch before, and takes a new name in any case.
--      The old name is retired: otherwise a first batch of that name which is still on its way would make the name known again,
--      and with it a duplicate of this batch.
--   d. Sequence number 1 without a key is a new writer: counted. A first batch that was delayed for more than a day, and whose
--      writer's key has been forgotten since, would count again. That is the residue.
local DAY = 86400
local sequence = tonumber(ARGV[1])

local last = redis.call('GET', KEYS[3])
if last == 'retired' then
  return {'unknown', sequence}
elseif last then
  last = cmsgpack.unpack(last)
  if sequence == last[1] then
    return last[2] or {'failed', sequence}
  elseif sequence < last[1] then
    return {'late', sequence}
  end
elseif sequence ~= 1 then
  redis.call('SET', KEYS[3], 'retired', 'EX', DAY)
  return {'unknown', sequence}
end

-- Everything is read before anything is written, so a value that the script does not understand leaves all keys unchanged.
local function text(number) return string.format('%.0f', number) end   -- tostring() gives 14 digits only
local totals = {}
for i = 1, 2 do
  local digits = redis.call('GET', KEYS[i]) or '0'
  if not (digits == '0' or digits:find('^[1-9]%d*$')) or #digits > 15 then   -- Lua's numbers are exact up to 2^53.
    return redis.error_reply('ERR ' .. KEYS[i] .. ' does not hold a count')
  end
  totals[i] = digits + ARGV[i + 1]
end
local hits, posts = totals[1], totals[2]

local keyed = #ARGV > 4
local newest, life
local answers, expired = {}, {}
if keyed then
  local time = redis.call('TIME')
  local now = time[1] * 1000000 + time[2]
  local eldest = now - DAY * 1000000
  newest = math.max(now, redis.call('ZRANGE', KEYS[5], -1, -1, 'WITHSCORES')[2] or 0)
  life = DAY + math.floor((newest - now) / 1000000)   -- While the clock is behind, the newest is not a day old after a day.
  -- One call forgets at most 1,000 keys, so that no call takes long. An older key that is still there is not honoured.
  expired = redis.call('ZRANGE', KEYS[5], '-inf', text(eldest), 'BYSCORE', 'LIMIT', 0, 1000)
  for i = 5, #ARGV do
    local answer = redis.call('HGET', KEYS[4], ARGV[i])
    local came = answer and redis.call('ZSCORE', KEYS[5], ARGV[i])
    if came and tonumber(came) > eldest then
      local whole, content = pcall(cmsgpack.unpack, answer)
      -- The answers of before there were versions have two parts.
      local known = whole and type(content) == 'table' and type(content[2]) == 'number' and (content[3] or 1) == 1
      answers[ARGV[i]] = known and {content[1], content[2]} or {-1, -1}
    end
  end
end

-- If a write fails nevertheless (the user lacks a right), this remains of the batch: it failed, and may have been counted.
redis.call('SET', KEYS[3], cmsgpack.pack({sequence}), 'EX', DAY)

redis.call('INCRBY', KEYS[1], ARGV[2])
redis.call('INCRBY', KEYS[2], ARGV[3])
local reply = {'counted', sequence, hits, posts, posts}

if keyed then
  if #expired > 0 then
    redis.call('HDEL', KEYS[4], unpack(expired))
    redis.call('ZREM', KEYS[5], unpack(expired))
  end
  local new = 0
  for i = 5, #ARGV do
    local answer = answers[ARGV[i]]
    if not answer then
      new = new + 1
      answer = {hits, posts + new}
      answers[ARGV[i]] = answer
      -- In this order, since what the hash alone holds would never be forgotten.
      redis.call('ZADD', KEYS[5], text(newest + i), ARGV[i])
      redis.call('HSET', KEYS[4], ARGV[i], cmsgpack.pack({answer[1], answer[2], 1}))
    end
    reply[#reply + 1] = answer[1]
    reply[#reply + 1] = answer[2]
  end
  if new > 0 then
    redis.call('INCRBY', KEYS[2], new)
    reply[5] = posts + new
  end

  local excess = redis.call('ZCARD', KEYS[5]) - tonumber(ARGV[4])
  if excess > 0 then
    local oldest = redis.call('ZRANGE', KEYS[5], 0, math.min(excess, 1000) - 1)
    redis.call('HDEL', KEYS[4], unpack(oldest))
    redis.call('ZREM', KEYS[5], unpack(oldest))
  end
  redis.call('EXPIRE', KEYS[4], life)
  redis.call('EXPIRE', KEYS[5], life)
end

redis.call('SET', KEYS[3], cmsgpack.pack({sequence, reply}), 'EX', DAY)
return reply
