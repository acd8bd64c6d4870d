// Clusters of the emulation in cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

#define _CG_HAS_CLUSTER_GROUP

namespace cooperative_groups {

struct cluster_group {
  static void sync() {
#ifdef EMULATION_WITHOUT_CLUSTER_SYNC
    emulation::grid->pass();
#else
    emulation::grid->meet(emulation::grid->block().cluster->meeting);
#endif
  }

  template <typename T>
  static T* map_shared_rank(T* address, unsigned rank) {
    emulation::grid->pass();
    auto const block = emulation::grid->block().cluster->first + rank;
    if (block == blockIdx.x) return address;
    if (emulation::grid->block(block).ended) {
      emulation::grid->fail("a look at the shared memory of a block that has ended");
    }
    auto const offset = reinterpret_cast<unsigned char*>(address) - reinterpret_cast<unsigned char*>(dynamic_shared);
    return reinterpret_cast<T*>(emulation::grid->block(block).shared.data() + offset);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
