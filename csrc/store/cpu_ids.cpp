#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>

#include "store/ids.h"

namespace lgk::store {
namespace {

constexpr uint64_t kFirst = 0x9e3779b97f4a7c15u, kSecond = 0xd6e8feb86659fd93u;
constexpr uint64_t kSlots = 1024;  // of an empty table
constexpr int64_t kAhead = 64;     // strings whose slots are fetched at a time

inline uint64_t folded(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Room for so many more, so that nothing that follows can fail halfway.
template <typename T>
void reserve(Table<T>& held, size_t more) {
  const size_t needed = held.size() + more;
  if (needed > held.capacity()) held.reserve(std::max(needed, held.capacity() + held.capacity() / 2));
}

}  // namespace

IdTable::IdTable() : slots_(kSlots) {
  std::random_device draw;  // so that nobody can choose ids that all fall on one slot
  seed_ = (static_cast<uint64_t>(draw()) << 32) | draw();
}

uint64_t IdTable::hash(std::string_view id) const {
  uint64_t state = seed_ ^ (id.size() * kFirst);
  const char* from = id.data();
  size_t left = id.size();
  for (; left >= 8; from += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, from, 8);
    state = folded(state ^ word, kFirst);
  }
  uint64_t word = 0;
  if (left > 0) std::memcpy(&word, from, left);
  return folded(folded(state ^ word, kSecond) ^ seed_, kFirst);
}

std::string_view IdTable::at(int64_t place) const {
  const uint64_t begin = place == 0 ? 0 : ends_[place - 1];
  return {bytes_.data() + begin, ends_[place] - begin};
}

uint64_t IdTable::slot_of(std::string_view id, uint64_t hash) const {
  const uint64_t mask = slots_.size() - 1;
  for (uint64_t slot = hash & mask;; slot = (slot + 1) & mask) {
    if (!holds(slot)) return slot;
    if ((slots_[slot] ^ hash) >> 32 == 0 && at(place_in(slot)) == id) return slot;
  }
}

void IdTable::put(std::string_view id, uint64_t hash, uint64_t slot) {
  bytes_.insert(bytes_.end(), id.begin(), id.end());
  ends_.push_back(bytes_.size());
  slots_[slot] = (hash >> 32 << 32) | ends_.size();
}

void IdTable::make_room(const std::vector<std::string_view>& ids) {
  const auto count = static_cast<int64_t>(ids.size());
  if (count > kMost - size()) throw std::length_error("logra_kernels: more than 2^32 - 1 ids");
  size_t bytes = 0;
  for (const std::string_view id : ids) bytes += id.size();
  reserve(bytes_, bytes);
  reserve(ends_, ids.size());
  uint64_t wanted = slots_.size();
  while ((ends_.size() + count) * 5 > wanted * 3) wanted *= 2;
  if (wanted == slots_.size()) return;
  Table<uint64_t>(wanted).swap(slots_);
  const uint64_t mask = wanted - 1;
  uint64_t keys[kAhead];
  for (int64_t begin = 0; begin < size(); begin += kAhead) {  // in the order they came, which `drop` relies on
    const int64_t end = std::min(size(), begin + kAhead);
    for (int64_t place = begin; place < end; ++place) {
      keys[place - begin] = hash(at(place));
      __builtin_prefetch(&slots_[keys[place - begin] & mask], 1);
    }
    for (int64_t place = begin; place < end; ++place) {
      const uint64_t key = keys[place - begin];
      uint64_t slot = key & mask;
      while (holds(slot)) slot = (slot + 1) & mask;
      slots_[slot] = (key >> 32 << 32) | static_cast<uint64_t>(place + 1);
    }
  }
}

template <class Visit>
void IdTable::each(const std::vector<std::string_view>& ids, const Visit& visit) const {
  const uint64_t mask = slots_.size() - 1;
  const auto count = static_cast<int64_t>(ids.size());
  uint64_t keys[kAhead];
  for (int64_t begin = 0; begin < count; begin += kAhead) {
    const int64_t end = std::min(count, begin + kAhead);
    for (int64_t i = begin; i < end; ++i) {
      keys[i - begin] = hash(ids[i]);
      __builtin_prefetch(&slots_[keys[i - begin] & mask], 1);  // each is a miss in a large table
    }
    for (int64_t i = begin; i < end; ++i) {
      if (!visit(i, keys[i - begin], slot_of(ids[i], keys[i - begin]))) return;
    }
  }
}

void IdTable::find(const std::vector<std::string_view>& ids, int64_t* places) const {
  each(ids, [&](int64_t i, uint64_t, uint64_t slot) {
    places[i] = holds(slot) ? place_in(slot) : kNone;
    return true;
  });
}

int64_t IdTable::add(const std::vector<std::string_view>& ids) {
  make_room(ids);
  int64_t there = kNone;
  each(ids, [&](int64_t i, uint64_t key, uint64_t slot) {
    if (holds(slot)) {
      there = i;
      return false;
    }
    put(ids[i], key, slot);
    return true;
  });
  if (there != kNone) drop(there);
  return there;
}

void IdTable::add_new(const std::vector<std::string_view>& ids, bool* fresh) {
  make_room(ids);
  each(ids, [&](int64_t i, uint64_t key, uint64_t slot) {
    fresh[i] = !holds(slot);
    if (fresh[i]) put(ids[i], key, slot);
    return true;
  });
}

// No string that is still there has passed over the slot of one that came later.
void IdTable::drop(int64_t count) {
  for (; count > 0; --count) {
    const int64_t last = size() - 1;
    const std::string_view id = at(last);
    slots_[slot_of(id, hash(id))] = 0;
    bytes_.resize(bytes_.size() - id.size());
    ends_.pop_back();
  }
}

}  // namespace lgk::store
