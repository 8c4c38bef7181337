// Pages of mapped files: brought in before their use, and let go. Addresses need no alignment.
#pragma once
#include <cstdint>

namespace lgk::store {

// Returns once [address, address + bytes) is in memory and in the page table. The disk is read by several threads at
// once: one alone waits for each piece. Huge pages are not asked for: after other reads of the file, cold ones came at
// less than half the rate with them. 0, or the errno of a disk that cannot be read (without this call, touching the
// page would end the process).
int populate(const void* address, int64_t bytes, int n_threads);

// Whether a sample of the range's pages, spread evenly, is in the page cache.
bool resident(const void* address, int64_t bytes);

// Takes whole pages out of the page table. What was written to a private mapping is lost.
void let_go(const void* address, int64_t bytes);

}  // namespace lgk::store
