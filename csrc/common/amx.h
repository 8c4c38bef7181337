// Intel's matrix unit: what it takes to use it. Its tiles are 16 rows of 64 bytes each, always configured so.
#pragma once

namespace lgk {

// Whether this machine has it and the system lets this process use it; asks the system once.
bool amx_usable();

// Configures the calling thread's tiles and releases them in the end, because whoever switches threads must save tiles
// that are in use. Nests; does nothing where the instruction set in use has no tiles. Configuring takes as long as
// some twenty products of tiles, so that a thread's work is best done in one scope; products configure what is not.
class TileScope {
 public:
  TileScope();
  ~TileScope();
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace lgk
