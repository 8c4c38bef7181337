// The ids of a store's rows: which are there, and the place of each in the order they came.
#pragma once
#include <cstdint>
#include <string_view>
#include <vector>

#include "store/huge_pages.h"

namespace lgk::store {

template <typename T>
using Table = std::vector<T, HugePages<T>>;

// Strings with places 0, 1, ..., compared in full. Takes the strings' bytes and some 24 bytes for each.
class IdTable {
 public:
  static constexpr int64_t kNone = -1;
  static constexpr int64_t kMost = (int64_t{1} << 32) - 1;

  IdTable();

  int64_t size() const { return static_cast<int64_t>(ends_.size()); }

  // The place of each string, or kNone.
  void find(const std::vector<std::string_view>& ids, int64_t* places) const;

  // Gives them the next places. If one is there, or twice among these, none gets one, and its index is returned; else
  // kNone. std::length_error when there are more than kMost.
  int64_t add(const std::vector<std::string_view>& ids);

  // Gives the next places to those that are not there, the first of equal ones; for each, whether it was one.
  void add_new(const std::vector<std::string_view>& ids, bool* fresh);

  // Forgets those that came last.
  void drop(int64_t count);

 private:
  uint64_t hash(std::string_view id) const;
  std::string_view at(int64_t place) const;
  // The slot that holds the string, or the empty one where it would be.
  uint64_t slot_of(std::string_view id, uint64_t hash) const;
  // visit(index, hash, slot) of each string in order, as long as it returns true.
  template <class Visit>
  void each(const std::vector<std::string_view>& ids, const Visit& visit) const;
  bool holds(uint64_t slot) const { return slots_[slot] != 0; }
  int64_t place_in(uint64_t slot) const { return static_cast<int64_t>(slots_[slot] & 0xffffffffu) - 1; }
  void put(std::string_view id, uint64_t hash, uint64_t slot);
  void make_room(const std::vector<std::string_view>& ids);

  uint64_t seed_;
  Table<uint64_t> slots_;  // a power of two; the upper half of the hash and the place + 1, or 0
  Table<uint64_t> ends_;   // of each string in bytes_
  Table<char> bytes_;
};

}  // namespace lgk::store
