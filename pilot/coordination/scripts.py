"""Writes to Redis that depend on its content, as Lua scripts: nothing can change between the check and the
write.

`server` is the key of the run's lock; its value, the identity of the server that holds it, is unique to a
process. Any server that writes may take a free lock: locks expire while a server is stopped or cut off.
"""

# KEYS: server. ARGV: the holder that we know of ("": none), our identity, expiry in ms. Returns 1 if we
# hold it now.
TAKE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1
"""
# KEYS: server, round, run. ARGV: our identity, expiry in ms, term, round, phase, reason, state. Returns 0 if
# another server leads, 2 if the keys are lost (or never existed), else 1: also where only the lock has expired.
TICK = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
local lost = redis.call('EXISTS', KEYS[2]) == 0
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
redis.call('HSET', KEYS[2], 'term', ARGV[3], 'round', ARGV[4], 'phase', ARGV[5], 'reason', ARGV[6])
redis.call('HSET', KEYS[3], 'term', ARGV[3], 'state', ARGV[7])
redis.call('PERSIST', KEYS[2])
redis.call('PERSIST', KEYS[3])
return lost and 2 or 1
"""
# KEYS: server. ARGV: our identity, expiry in ms.
RENEW = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
"""
# KEYS: server, then keys. ARGV: our identity, then (value, expiry in ms) per key; "" deletes the key.
NOTE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
for i = 2, #KEYS do
  local value, expiry = ARGV[2 * i - 2], ARGV[2 * i - 1]
  if value == '' then redis.call('DEL', KEYS[i]) else redis.call('SET', KEYS[i], value, 'PX', expiry) end
end
return 1
"""
# KEYS: server, a key to delete with it, round, run. ARGV: our identity, seconds until the others expire.
RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('EXPIRE', KEYS[3], ARGV[2])
redis.call('EXPIRE', KEYS[4], ARGV[2])
return 1
"""
# KEYS: a string, which is deleted if it begins with ARGV. Returns what it was ("": there was none).
CLEAR = """
local value = redis.call('GET', KEYS[1])
if value and string.sub(value, 1, #ARGV[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return value or ''
"""
