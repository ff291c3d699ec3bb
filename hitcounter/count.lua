-- This script counts one batch exactly once. No other code writes the keys below. Redis runs the script atomically, and appends
-- its effects to the append-only file as one transaction. So after a crash Redis has either the whole batch or nothing of it.
--
-- KEYS  1 hits     the number of hits so far
--       2 posts    the number of posts so far
--       3 writer   the last batch of this writer, which is one lane of one process: {sequence, reply}; or {sequence} if that
--                  batch failed half-way; or 'retired'. Redis deletes this key a day after the last write to it.
--       4 answers  a hash: digest of an Idempotency-Key -> {hits, posts, 1}, the answer that this key got; 1 is the version of
--                  this format
--       5 order    a sorted set: digest -> time at which the key arrived, in microseconds; the oldest keys are forgotten first.
--                  A new key gets a later time than all keys before it, even if the clock was set back.
-- ARGV  1 sequence number of this batch: 1, 2, 3 ... for each writer
--       2 hits to count
--       3 posts to count, without those that have an Idempotency-Key
--       4 the number of Idempotency-Keys to remember at most
--       5 ... the digest of the Idempotency-Key of each further post
--
-- The reply is {'counted', sequence, hits, posts, all posts, then two numbers for each digest: its hits and posts}. `sequence` is
-- the number of the batch that is answered. The first hits and posts are the totals after this batch's hits and its posts without
-- a key. `all posts` is the total after all posts of this batch. If the stored answer has an unknown version, the two numbers of
-- its digest are -1. If this call counts nothing, the reply is {'late', sequence}, {'unknown', sequence} or {'failed', sequence}.
--
-- Why does a batch that is sent twice count only once? A writer sends batch n + 1 only after it has received the reply to batch n
-- or has given up batch n for good. So there are four cases:
--   a. The same batch arrives again, because its reply was lost, or because too few replicas had it in time. Its sequence number
--      equals that of the last batch, so the script repeats the first reply.
--   b. A batch was stuck on an old connection and arrives after newer batches. Its sequence number is lower than that of the last
--      batch, so the reply is 'late'.
--   c. The writer's key is missing: the writer has sent no batch for a day, or Redis has lost the key. The script cannot know
--      whether it counted this batch before, so the reply is 'unknown'. The writer knows whether it sent the batch before, and
--      takes a new name in any case. The script retires the old name. Otherwise a delayed first batch of the old name could
--      create the key again, and the script would then count a delayed duplicate of a batch that was counted already.
--   d. A batch has the sequence number 1, and its writer has no key. The writer is new, so the batch is counted. Only here can a
--      batch count twice: a duplicate of a first batch is delayed for more than a day, by Redis's clock, and Redis has deleted
--      the writer's key.
local DAY = 86400
local sequence = tonumber(ARGV[1])

local last = redis.call('GET', KEYS[3])
if last == 'retired' then
  return {'unknown', sequence}
elseif last then
  last = cmsgpack.unpack(last)
  if sequence == last[1] then
    if not last[2] then
      return {'failed', sequence}
    end
    -- WAIT covers only what its own connection has written. If the writer repeats a batch over a new connection, this write makes
    -- WAIT cover the first one, too.
    redis.call('EXPIRE', KEYS[3], DAY)
    return last[2]
  elseif sequence < last[1] then
    return {'late', sequence}
  end
elseif sequence ~= 1 then
  redis.call('SET', KEYS[3], 'retired', 'EX', DAY)
  return {'unknown', sequence}
end

-- The script reads every value before it writes any. So if a key has a value of another kind, all keys stay unchanged.
local function text(number) return string.format('%.0f', number) end   -- tostring() prints only 14 digits.
local totals = {}
for i = 1, 2 do
  local digits = redis.call('GET', KEYS[i]) or '0'
  if not (digits == '0' or digits:find('^[1-9]%d*$')) or #digits > 15 then   -- Lua's numbers are exact up to 16 digits (2^53).
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
  -- If the clock was set back, the newest key has a time in the future. Redis must keep `answers` and `order` until a day after
  -- that time.
  life = DAY + math.ceil((newest - now) / 1000000)
  -- One call forgets at most 1,000 expired keys, so that no call takes long. The code below ignores expired keys that remain.
  expired = redis.call('ZRANGE', KEYS[5], '-inf', text(eldest), 'BYSCORE', 'LIMIT', 0, 1000)
  for i = 5, #ARGV do
    local answer = redis.call('HGET', KEYS[4], ARGV[i])
    local came = answer and redis.call('ZSCORE', KEYS[5], ARGV[i])
    if came and tonumber(came) > eldest then
      local whole, content = pcall(cmsgpack.unpack, answer)
      -- An answer without a version was stored by an older script. Its format is that of version 1.
      local known = whole and type(content) == 'table' and type(content[2]) == 'number' and (content[3] or 1) == 1
      answers[ARGV[i]] = known and {content[1], content[2]} or {-1, -1}
    end
  end
end

-- A write below fails if the user lacks a right. Then this value stays, and shows that the batch failed half-way.
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
      -- Write to `order` first, so that no failure leaves a digest only in `answers`. Such a digest would never be forgotten.
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
