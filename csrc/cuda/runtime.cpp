// SPDX-License-Identifier: Apache-2.0
#include "runtime.h"

#include "model_runtime.h"

namespace moetion {

std::shared_ptr<Runtime> make_runtime(const std::string& device, const std::string& fault, uint64_t seed) {
  const size_t colon = device.find(':');
  const std::string kind = device.substr(0, colon);
  if (kind == "model") return std::make_shared<ModelRuntime>(fault, seed);
  const std::string number = colon == std::string::npos ? "" : device.substr(colon + 1);
  if (kind != "cuda" || number.empty() || number.size() > 4 ||
      number.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument("device is '" + device + "'; it must be cuda:N or model:N");
  return make_cuda_runtime(std::stoi(number));
}

}  // namespace moetion
