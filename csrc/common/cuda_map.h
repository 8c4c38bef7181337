// Tensor maps for the copy engine of sm_90. The driver's function is looked up at run time: nothing links libcuda.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace lgk {

// A map of 16-bit numbers [samples, rows, columns], strides in numbers, whose boxes are [1, box_rows, 64] and lie
// swizzled by 128 bytes. Address and strides are multiples of 16 bytes, as the driver checks.
inline CUtensorMap tensor_map(const char* op, const void* data, int64_t columns, int64_t rows, int64_t samples,
                              int64_t row_stride, int64_t sample_stride, int box_rows) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = {};
    const auto status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return status == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  if (encode == nullptr) throw std::runtime_error(std::string(op) + ": this driver knows no tensor maps");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(samples)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 2, static_cast<cuuint64_t>(sample_stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows), 1}, steps[] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(data), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": the driver refuses a tensor map, error " + std::to_string(status));
  }
  return map;
}

}  // namespace lgk
